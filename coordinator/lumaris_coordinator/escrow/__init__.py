"""Escrow: the buyer's cap, held per session until the session is settled."""
