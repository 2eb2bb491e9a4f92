"""What every part of the coordinator is given: settings, key, clock and store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lumaris_coordinator.config import Settings
from lumaris_coordinator.store.store import Store
from lumaris_protocol.keys import KeyPair, PeerId


@dataclass(frozen=True)
class Context:
    """The shared parts; they hold no rules."""

    settings: Settings
    key: KeyPair
    clock: Callable[[], float]
    store: Store

    @property
    def peer(self) -> PeerId:
        """The coordinator's own peer id."""
        return self.key.peer_id

    def now(self) -> int:
        """The coordinator's time in whole seconds; the only clock that deadlines are held to."""
        return int(self.clock())
