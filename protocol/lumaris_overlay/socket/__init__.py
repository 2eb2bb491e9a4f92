"""The overlay's port over a Unix socket: the server of the overlay process, and its client."""

from lumaris_overlay.socket.client import SocketOverlay, open_socket_overlay
from lumaris_overlay.socket.server import serve_socket

__all__ = ["SocketOverlay", "open_socket_overlay", "serve_socket"]
