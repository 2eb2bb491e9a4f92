"""Tier `vm`: one QEMU machine for each order."""
