"""The families of frauds and their genuine twins, one a file."""
