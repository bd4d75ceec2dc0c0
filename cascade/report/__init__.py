"""What a ledger's journal says, as one page that a manager and an auditor can read."""
