"""Links: one connection between two programs that carries all they have to say to each other."""

from lumaris_overlay.links.link import Timing
from lumaris_overlay.links.overlay import LinkedOverlay, open_links
from lumaris_overlay.links.target import DirectTarget

__all__ = ["DirectTarget", "LinkedOverlay", "Timing", "open_links"]
