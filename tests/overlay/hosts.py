"""Real hosts for the overlay's tests."""

from __future__ import annotations

from typing import Any

from lumaris_overlay.libp2p.host import HostConfig
from lumaris_protocol.keys import KeyPair
from tests.overlay.world import KEYS, NETWORK, certificate, key_of


def member(who: str | KeyPair, **settings: Any) -> HostConfig:
    """The configuration of a host that is let in everywhere."""
    key = key_of(who) if isinstance(who, str) else who
    settings.setdefault("certificate", certificate(key.peer_id))
    return HostConfig(key=key, network=NETWORK, coordinator_keys=KEYS, **settings)


def stranger(who: str | KeyPair, **settings: Any) -> HostConfig:
    """The configuration of a host without a certificate."""
    return member(who, certificate=b"", **settings)
