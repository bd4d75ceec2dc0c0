"""The feature engine against a plain reference, and against itself."""
