"""The real peer network. Only the overlay process imports this: loading libp2p takes a second."""
