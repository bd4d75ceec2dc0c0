"""`cascade bench pipeline`: compares whole services, from the transactions topic to the decisions topic."""
