"""A whole market on one machine, for trying things out and for users' own tests."""
