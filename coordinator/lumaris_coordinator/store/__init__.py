"""The coordinator's store: one file, one writer that commits in groups, readers that never wait."""
