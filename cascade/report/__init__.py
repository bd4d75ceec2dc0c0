"""The report: the journal of a ledger as one HTML page for managers and auditors."""
