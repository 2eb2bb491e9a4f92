"""The coordinator as one peer of the overlay; the market works without it."""
