"""Running other people's code: one port, a module for each tier. See `port`."""
