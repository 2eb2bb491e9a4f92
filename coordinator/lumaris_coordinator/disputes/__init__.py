"""Disputes: claims over an agreement, decided by rules that need no judgement."""
