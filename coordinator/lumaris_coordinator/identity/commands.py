"""The commands about keys and operators: what the command line calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from lumaris_coordinator.bounds import API_KEY_LIFETIME_S, KEY_STARTS_AFTER_S
from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity import keys
from lumaris_coordinator.identity.api_keys import Wanted, issue
from lumaris_coordinator.identity.secrets import Vault
from lumaris_coordinator.identity.users import add, new_user
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_overlay.private_files import read_key
from lumaris_protocol import key_list
from lumaris_protocol.messages.notice import SigningKey


def create_operator(
    settings: Settings, name: str, *, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Make an operator with its first API key, whose text is told this once. The coordinator may
    serve meanwhile. Raises LumarisError `name_taken` or `not_writable`."""
    now = int(clock())
    ring = keys.KeyRing(settings.state, network=settings.network, clock=clock)
    backend = backend_of(settings.state, settings.database)
    backend.migrate(MIGRATIONS)
    user = new_user(name, "", operator=True, now=now)
    wanted = Wanted("first", ("operator", "read", "write"), API_KEY_LIFETIME_S, 100)
    with closing(backend.writer()) as connection:
        connection.execute("BEGIN IMMEDIATE")
        add(connection, user, settings.currency)
        made = issue(
            connection,
            Vault(ring.first.seed),
            wanted,
            holder=user.id,
            network=settings.network,
            now=now,
        )
        connection.execute("COMMIT")
    return {"user": user.id, **made}


def show(settings: Settings) -> dict[str, Any]:
    """The key list: {root, root_here, seq, keys: [{peer, state, not_before, not_after}]}."""
    now = time.time()
    ring = keys.KeyRing(settings.state, network=settings.network, clock=time.time)
    message = ring.list.message
    current = key_list.newest(message, now=now)
    return {
        "root": message.root,
        "root_here": (settings.state / keys.FOLDER / keys.ROOT_KEY).exists(),
        "seq": message.seq,
        "keys": [
            {
                "peer": key.peer,
                "state": _state(key, current, now),
                "not_before": key.not_before,
                "not_after": key.not_after,
            }
            for key in message.keys
        ],
    }


def rotate(settings: Settings, root: Path, *, after_s: int = KEY_STARTS_AFTER_S) -> dict[str, Any]:
    """Add a signing key; {peer, starts_at}. Raises LumarisError as `keys.rotate` and `read_key`."""
    now = int(time.time())
    made = keys.rotate(
        settings.state, read_key(root), network=settings.network, now=now, after_s=after_s
    )
    return {"peer": made.peer_id, "starts_at": now + after_s}


def revoke(settings: Settings, root: Path, peer: str) -> None:
    """Take a signing key back. Raises LumarisError as `keys.revoke` and `read_key`."""
    keys.revoke(
        settings.state, read_key(root), peer, network=settings.network, now=int(time.time())
    )


def _state(key: SigningKey, current: str | None, now: float) -> str:
    if key.revoked_at:
        return "revoked"
    if key.peer == current:
        return "current"
    if now < key.not_before:
        return "waiting"
    return "old" if key_list.is_valid(key, now) else "ended"
