"""The commands about keys and operators: what the command line calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from lumaris_coordinator.bounds import (
    API_KEY_LIFETIME_S,
    API_KEYS_PER_USER_MAX,
    CREDENTIAL_RATE,
    KEY_STARTS_AFTER_S,
)
from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity import keys, people
from lumaris_coordinator.identity.api_keys import Wanted, issue
from lumaris_coordinator.identity.people import User
from lumaris_coordinator.identity.secrets import Vault
from lumaris_coordinator.identity.users import add, new_user
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.upkeep import folder
from lumaris_overlay.private_files import read_key
from lumaris_protocol import key_list
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.notice import SigningKey

_OPERATOR: Final = Wanted("first", ("operator", "read", "write"), API_KEY_LIFETIME_S, 100)


def create_operator(
    settings: Settings, name: str, *, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Make an operator with its first API key, whose text is told this once. The coordinator may
    serve meanwhile. Raises LumarisError `name_taken` or `not_writable`."""
    return _create(settings, name, _OPERATOR, operator=True, clock=clock)


def operators(
    settings: Settings, *, clock: Callable[[], float] = time.time
) -> list[dict[str, Any]]:
    """{name, user, created_at, keys} of every operator; the keys without their texts."""
    now = int(clock())
    with folder.opened(settings) as (_, connection):
        return [
            {
                "name": user.name,
                "user": user.id,
                "created_at": user.created_at,
                "keys": [key.shown() for key in people.keys_of(connection, user.id, now=now)],
            }
            for user in people.operators(connection)
        ]


def revoke_operator(settings: Settings, name: str) -> dict[str, Any]:
    """End every API key of an operator at once; {user, keys} with their number.

    Raises LumarisError `not_found`.
    """
    with folder.opened(settings, write=True) as (_, connection):
        user = _operator(connection, name)
        return {"user": user.id, "keys": people.end_keys(connection, user.id)}


def renew_operator(
    settings: Settings, name: str, *, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """End every API key of an operator and make one in their place, told this once.

    Raises LumarisError `not_found`.
    """

    def work(connection: Connection) -> User:
        user = _operator(connection, name)
        people.end_keys(connection, user.id)
        return user

    return _with_key(settings, work, _OPERATOR, clock=clock)


def _operator(connection: Connection, name: str) -> User:
    user = people.by_name(connection, name)
    if user is None or not user.operator:
        raise LumarisError(
            "not_found",
            f"There is no operator {name[:64]!r}.",
            hint="`lumaris coordinator operator list` shows those that there are.",
        )
    return user


def create_user(
    settings: Settings,
    name: str,
    scopes: Sequence[str] = ("read", "write"),
    *,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Make a user without a password, as `create_operator` does: it comes with its API key."""
    wanted = Wanted("first", tuple(scopes), API_KEY_LIFETIME_S, CREDENTIAL_RATE)
    return _create(settings, name, wanted, operator=False, clock=clock)


def create_key(
    settings: Settings,
    name: str,
    scopes: Sequence[str] = ("read",),
    *,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Another API key for a user that is no operator, such as one that lost its own.

    Raises LumarisError: `not_found`, `limit_reached`, `not_writable`.
    """
    now = int(clock())
    wanted = Wanted("by the operator", tuple(scopes), API_KEY_LIFETIME_S, CREDENTIAL_RATE)

    def work(connection: Connection) -> User:
        user = people.by_name(connection, name)
        if user is None or user.operator:
            raise LumarisError(
                "not_found",
                f"There is no user {name[:64]}.",
                hint="`lumaris coordinator user create` makes one; operators have a command of"
                " their own, `operator renew`.",
            )
        if len(people.keys_of(connection, user.id, now=now)) >= API_KEYS_PER_USER_MAX:
            raise LumarisError("limit_reached", f"{API_KEYS_PER_USER_MAX} keys exist.")
        return user

    return _with_key(settings, work, wanted, clock=clock)


def _create(
    settings: Settings,
    name: str,
    wanted: Wanted,
    *,
    operator: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    try:
        msgspec.convert(name, people.UserName)
    except msgspec.ValidationError as error:
        raise LumarisError("usage", f"That is no name for a user: {error}.") from None
    user = new_user(name, "", operator=operator, now=int(clock()))

    def work(connection: Connection) -> User:
        add(connection, user, settings.currency)
        return user

    return _with_key(settings, work, wanted, clock=clock)


def _with_key(
    settings: Settings,
    work: Callable[[Connection], User],
    wanted: Wanted,
    *,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """A key for the user that `work` finds or makes, in one transaction."""
    ring = folder.keys_of(settings)
    with folder.opened(settings, write=True) as (_, connection):
        user = work(connection)
        made = issue(
            connection,
            Vault(ring.first.seed),
            wanted,
            holder=user.id,
            network=settings.network,
            now=int(clock()),
        )
    return {"user": user.id, **made}


def show(settings: Settings) -> dict[str, Any]:
    """The key list: {root, root_here, seq, keys: [{peer, state, not_before, not_after}]}."""
    now = time.time()
    message = folder.keys_of(settings).list.message
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
    """Add a signing key; {peer, starts_at, waiting}: the last are other keys that sign later, as
    {peer, starts_at}. Raises LumarisError as `keys.rotate` and `read_key`."""
    now = int(time.time())
    made = keys.rotate(
        settings.state, _root_in(root), network=settings.network, now=now, after_s=after_s
    )
    path = settings.state / keys.FOLDER / keys.LIST
    listed = keys.read_list(path, settings.network).message
    waiting = [key for key in keys.waiting_in(listed, now=now) if key.peer != made.peer_id]
    return {
        "peer": made.peer_id,
        "starts_at": now + after_s,
        "waiting": [{"peer": key.peer, "starts_at": key.not_before} for key in waiting],
    }


def revoke(settings: Settings, root: Path, peer: str) -> None:
    """Take a signing key back. Raises LumarisError as `keys.revoke` and `read_key`."""
    keys.revoke(
        settings.state, _root_in(root), peer, network=settings.network, now=int(time.time())
    )


def _root_in(file: Path) -> KeyPair:
    try:
        return read_key(file)
    except LumarisError as error:
        if error.code != "not_found":
            raise
        hint = "Name the root key's file: it was made as keys/root.key in the folder."
        raise LumarisError("not_found", error.message, hint=hint) from None


def _state(key: SigningKey, current: str | None, now: float) -> str:
    if key.revoked_at:
        return "revoked"
    if key.peer == current:
        return "current"
    if now < key.not_before:
        return "waiting"
    return "old" if key_list.is_valid(key, now) else "ended"
