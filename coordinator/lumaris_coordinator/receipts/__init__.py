"""The public log of receipts, and the files that prove one offline."""
