"""The key list as the data knows it: the newest that any folder of this coordinator had.

Replicas have a folder each, and a folder may come back from a copy. The data keeps the newest list,
which its root signed: a replica that was not given a new key's file still knows the key, and a
list from before a revocation is not gone on with.
"""

from __future__ import annotations

import base64
from typing import Final

from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import key_list
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.messages.notice import KeyList

_SETTING: Final = "key_list"


def newest(connection: Connection) -> bytes:
    """The list that is kept; empty before there is one."""
    row = first(connection, "SELECT value FROM setting WHERE name = ?", (_SETTING,))
    return base64.b64decode(row[0]) if row else b""


def names(connection: Connection, held: Signed[KeyList], *, network: str) -> list[str]:
    """The keys that the kept list names. Raises LumarisError `config_invalid` as `exchange`."""
    data = newest(connection)
    return [key.peer for key in _read(data, held, network).message.keys] if data else []


def exchange(connection: Connection, held: Signed[KeyList], *, network: str) -> bytes:
    """An operation: keep a folder's list if it is the newer one; the list to go on with.

    Raises LumarisError `config_invalid` for a list of another root, or where two different lists
    have one number: keys were added in two folders.
    """
    data = newest(connection)
    if data:
        kept = _read(data, held, network).message
        if kept.seq > held.message.seq or kept == held.message:
            return data
        if kept.seq == held.message.seq:
            raise LumarisError(
                "config_invalid",
                f"Two key lists have the number {kept.seq}: the folder's and the one in use.",
                hint="Bring back the folder keys of the replica where keys were last changed.",
            )
    text = base64.b64encode(held.data).decode()
    connection.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (_SETTING, text),
    )
    return held.data


def _read(data: bytes, held: Signed[KeyList], network: str) -> Signed[KeyList]:
    try:
        return key_list.open_list(data, network=network, root=held.signer)
    except EnvelopeError:
        raise LumarisError(
            "config_invalid",
            "The key list in the folder keys has another root than the coordinator's.",
            hint="Bring back the coordinator's own folder keys.",
        ) from None
