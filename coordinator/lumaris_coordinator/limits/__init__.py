"""How often anybody may ask: per key, per token and per address, in memory."""
