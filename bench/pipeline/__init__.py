"""`cascade bench pipeline`: whole services side by side, from the transactions topic to the decisions topic."""
