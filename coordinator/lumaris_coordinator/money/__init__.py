"""Money in and out: funding adapters, deposits, payouts, and the daily comparison of the books."""
