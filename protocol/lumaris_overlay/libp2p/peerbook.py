"""The peers met before, so that a restart finds the network without its bootstrap addresses."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lumaris_protocol.limits import ADDRESS_CHARS_MAX, ADDRESSES_MAX, PEERS_REMEMBERED_MAX

_FILE_BYTES_MAX = PEERS_REMEMBERED_MAX * (ADDRESSES_MAX * ADDRESS_CHARS_MAX + 128)


class PeerBook:
    """Addresses by peer id, newest last, bounded, kept in one JSON file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._peers: dict[str, tuple[str, ...]] = {}
        if path is not None:
            self._peers = _read(path)

    def addresses(self) -> dict[str, tuple[str, ...]]:
        """All that is remembered."""
        return dict(self._peers)

    def remember(self, peer: str, addresses: tuple[str, ...]) -> None:
        """Keep where a peer was reached; saved at once when it changed something."""
        kept = tuple(a for a in addresses if len(a) <= ADDRESS_CHARS_MAX)[:ADDRESSES_MAX]
        if not kept or self._peers.get(peer) == kept:
            return
        self._peers.pop(peer, None)
        while len(self._peers) >= PEERS_REMEMBERED_MAX:
            del self._peers[next(iter(self._peers))]
        self._peers[peer] = kept
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        draft = self._path.with_suffix(".new")
        # The book is a convenience: a full disk must not stop the overlay.
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(self._peers))
            os.replace(draft, self._path)


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_FILE_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        peer: tuple(str(address) for address in addresses[:ADDRESSES_MAX])
        for peer, addresses in list(found.items())[-PEERS_REMEMBERED_MAX:]
        if isinstance(addresses, list)
    }
