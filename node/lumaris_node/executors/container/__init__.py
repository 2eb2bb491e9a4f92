"""Tier `container`: a Docker engine, hardened, with one warm container for each lease."""
