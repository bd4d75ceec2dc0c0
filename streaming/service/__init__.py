"""The service around the workers: start and end, health, metrics, checks."""
