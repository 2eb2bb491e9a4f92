"""Rows of cosignatures: what witnesses said about the log's heads."""

from __future__ import annotations

from collections.abc import Sequence

from lumaris_coordinator.bounds import COSIGNED_HEADS_COMPARED
from lumaris_coordinator.ledger.bonds import band
from lumaris_coordinator.receipts import tree
from lumaris_coordinator.receipts.tree import Head
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.limits import WITNESSES_MAX


def lines_of(connection: Connection, size: int) -> list[str]:
    """The cosignature lines of a head; `add` bounds them."""
    rows = all_rows(
        connection, "SELECT line FROM cosignature WHERE size = ? ORDER BY witness", (size,)
    )
    return [str(line) for (line,) in rows]


def signed_note(connection: Connection, head: Head) -> str:
    """A head's note with its cosignatures."""
    return head.note + "".join(lines_of(connection, head.size))


def best_head(connection: Connection, *, after: int) -> Head | None:
    """Of the newest cosigned heads that hold leaf `after`, the one with the most cosignatures, and
    of those the newest. None without any."""
    rows = all_rows(
        connection,
        "SELECT size, count(*) FROM cosignature WHERE size > ? GROUP BY size"
        " ORDER BY size DESC LIMIT ?",
        (after, COSIGNED_HEADS_COMPARED),
    )
    if not rows:
        return None
    size, _ = max(rows, key=lambda row: (int(row[1]), int(row[0])))
    return tree.head_at(connection, int(size))


def add(
    connection: Connection,
    *,
    size: int,
    witness: str,
    line: str,
    now: int,
    chosen: Sequence[str],
    room: int,
    currency: str,
) -> bool:
    """Keep a cosignature, one for each witness and head; False when there is no room for it.

    `chosen` witnesses always have room. All others share `room` places, which belong to those in
    the best standing: whoever is early with many new names keeps none of them out, for half as
    many again are kept when the places are taken.
    """
    rows = all_rows(connection, "SELECT witness FROM cosignature WHERE size = ?", (size,))
    held = {str(name) for (name,) in rows}
    if witness in held:
        return True
    if witness not in chosen:
        known = standing(connection, currency=currency, also=witness)
        best = [name for name in known if name not in chosen][:room]
        others = sum(name not in chosen for name in held)
        if witness not in best or others >= room + room // 2:
            return False
    connection.execute(
        "INSERT INTO cosignature (size, witness, line, at) VALUES (?, ?, ?, ?)",
        (size, witness, line, now),
    )
    return True


def standing(connection: Connection, *, currency: str, also: str = "") -> list[str]:
    """The witnesses of the newest heads and `also` one that wants to be: those with a larger bond
    first, then those that have cosigned for longer."""
    rows = all_rows(
        connection,
        "SELECT witness FROM cosignature ORDER BY size DESC, witness LIMIT ?",
        (WITNESSES_MAX * COSIGNED_HEADS_COMPARED,),
    )
    names = {str(name) for (name,) in rows} | ({also} if also else set())

    def rank(name: str) -> tuple[int, bool, int, str]:
        # By its first head and not by the least time: one query that costs the same for ever.
        row = first(
            connection,
            "SELECT at FROM cosignature WHERE witness = ? ORDER BY size LIMIT 1",
            (name,),
        )
        return -band(connection, name, currency), row is None, int(row[0]) if row else 0, name

    return sorted(names, key=rank)


def last_size(connection: Connection, witness: str) -> int:
    """The size that a witness cosigned last, as far as we know."""
    row = first(
        connection, "SELECT coalesce(max(size), 0) FROM cosignature WHERE witness = ?", (witness,)
    )
    return int(row[0]) if row else 0
