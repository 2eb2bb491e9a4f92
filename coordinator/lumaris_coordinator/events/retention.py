"""How long events are kept, and what a reader is told that comes back after that.

What is kept is always the end of the sequence and never empty, so a number is never given twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumaris_coordinator.bounds import EVENTS_PRUNED_AT_ONCE_MAX, EVENTS_PRUNED_PER_ROUND_MAX
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.store.store import Store


def check_cursor(connection: Connection, after: int | None) -> None:
    """Whether nothing between a reader's place and now is gone; 0 is the beginning of what is kept.
    A place ahead of every event is of another time: its reader would wait for ever.

    Raises LumarisError `cursor_expired`.
    """
    if not after:
        return
    row = first(connection, "SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM event")
    assert row is not None
    oldest, newest = row
    if after < oldest - 1:
        raise LumarisError("cursor_expired", f"The oldest event that is kept is {oldest}.")
    if after > newest:
        raise LumarisError("cursor_expired", f"There is no event yet after {newest}.")


async def prune(store: Store, *, now: int, kept_s: int) -> int:
    """Forget events that are older, some at a time so that nobody waits for it; how many."""
    done = 0
    while done < EVENTS_PRUNED_PER_ROUND_MAX:
        found = await store.submit(lambda connection: _prune(connection, before=now - kept_s))
        done += found
        if found < EVENTS_PRUNED_AT_ONCE_MAX:
            break
    return done


def _prune(connection: Connection, *, before: int) -> int:
    """An operation: the oldest events up to the first that is younger, and never the newest."""
    rows = all_rows(
        connection,
        "SELECT id, at FROM event WHERE id < (SELECT max(id) FROM event) ORDER BY id LIMIT ?",
        (EVENTS_PRUNED_AT_ONCE_MAX,),
    )
    count = 0
    for _, at in rows:
        if at >= before:
            break
        count += 1
    if count:
        last = rows[count - 1][0]
        connection.execute("DELETE FROM event_party WHERE event <= ?", (last,))
        connection.execute("DELETE FROM event WHERE id <= ?", (last,))
    return count
