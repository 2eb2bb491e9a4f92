"""The Lumaris protocol: what is said between peers, and the rules both sides apply to it.

Everything here is sans-I/O. Facts come in as arguments (`now` and randomness too), decisions go out
as return values; the parts around it own the sockets, the clock and the disk.
"""

__version__ = "0.1.0"
