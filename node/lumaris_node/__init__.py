"""The seller's node: offers capacity, runs other people's code, meters it and gets paid."""
