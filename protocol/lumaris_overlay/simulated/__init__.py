"""A peer network in memory, with the same rules as the real one. For tests and simulations."""

from lumaris_overlay.simulated.network import SimulatedNetwork, SimulatedOverlay, open_network

__all__ = ["SimulatedNetwork", "SimulatedOverlay", "open_network"]
