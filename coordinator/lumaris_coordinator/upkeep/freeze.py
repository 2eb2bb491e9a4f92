"""The switch that stops new obligations while what exists is settled and can be read.

It lies in the database, so it holds for every replica at once and outlives restarts. This module
knows no room: every room that makes an obligation asks it.
"""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.errors import LumarisError

_SETTING: Final = "frozen"


def set_frozen(connection: Connection, on: bool) -> None:
    """Refuse new grants, credits and payouts from now on, or take them again. An operation."""
    connection.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (_SETTING, "1" if on else "0"),
    )


def is_frozen(connection: Connection) -> bool:
    """Whether the switch is on."""
    return first(connection, "SELECT value FROM setting WHERE name = ?", (_SETTING,)) == ("1",)


def require_thawed(connection: Connection) -> None:
    """Called inside the operation that would make something new. Raises LumarisError `frozen`."""
    if is_frozen(connection):
        raise LumarisError("frozen")
