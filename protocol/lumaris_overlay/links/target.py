"""Where a peer's program can be dialled directly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DirectTarget:
    """The direct listener of a program: its (IP, port) pairs and the pin of its certificate."""

    addresses: tuple[tuple[str, int], ...]
    pin: str  # SHA-256 of the DER certificate, lower-case hex
