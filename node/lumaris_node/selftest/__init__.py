"""Assurance by test: a tier is offered for what held when it was attacked, not for its settings."""
