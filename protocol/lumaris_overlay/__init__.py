"""The peer network behind ports: adverts, the directory, streams. See `ports`."""
