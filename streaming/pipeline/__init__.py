"""The steps of a transaction, from fetched bytes to an acknowledged decision."""
