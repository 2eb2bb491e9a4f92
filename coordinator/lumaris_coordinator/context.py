"""What every part of the coordinator is given: settings, keys, clock, store and notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity.keys import KeyRing
from lumaris_coordinator.identity.notices import Notices
from lumaris_coordinator.store.store import Store
from lumaris_protocol.keys import KeyPair, PeerId


@dataclass(frozen=True)
class Context:
    """The shared parts; they hold no rules."""

    settings: Settings
    keys: KeyRing
    clock: Callable[[], float]
    store: Store
    notices: Notices = field(default_factory=Notices)

    @property
    def key(self) -> KeyPair:
        """The key that signs now what names no other."""
        return self.keys.current

    @property
    def peer(self) -> PeerId:
        """The coordinator's own peer id; after a rotation one of several, see `keys.peers`."""
        return self.key.peer_id

    def now(self) -> int:
        """The coordinator's time in whole seconds; the only clock that deadlines are held to."""
        return int(self.clock())
