"""Events sent to the addresses that their owners name."""
