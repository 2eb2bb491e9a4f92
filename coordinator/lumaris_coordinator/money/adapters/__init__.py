"""The funding adapters."""
