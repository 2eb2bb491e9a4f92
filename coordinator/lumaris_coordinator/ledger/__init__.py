"""The double-entry ledger: every movement of money, and the proof that it adds up."""
