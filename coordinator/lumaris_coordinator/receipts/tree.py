"""The log's tree in the store: full tiles are rows, and what is not full follows from fewer than
256 rows below it. Every row is immutable, so what is read needs no snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol import merkle, tiles
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.tiles import Edge, FullTile, ReadTile, TileName, TileTree

T = TypeVar("T")

_HASH_BYTES = 32


@dataclass(frozen=True)
class Head:
    """A tree that the log's key signed."""

    size: int
    note: str


def newest(connection: Connection) -> Head | None:
    """The newest committed head; None before the first leaf."""
    row = first(connection, "SELECT size, note FROM checkpoint ORDER BY size DESC LIMIT 1")
    return Head(int(row[0]), str(row[1])) if row else None


def head_at(connection: Connection, size: int) -> Head | None:
    """The head that was signed at this size, if one was."""
    row = first(connection, "SELECT size, note FROM checkpoint WHERE size = ?", (size,))
    return Head(int(row[0]), str(row[1])) if row else None


def read_tile(connection: Connection, level: int, n: int, start: int, end: int) -> Sequence[bytes]:
    """What a tile holds from `start` to before `end`, or as much of it as there is."""
    row = first(connection, "SELECT hashes FROM tile WHERE level = ? AND n = ?", (level, n))
    if row is not None:
        data = bytes(row[0])[start * _HASH_BYTES : end * _HASH_BYTES]
        return [data[at : at + _HASH_BYTES] for at in range(0, len(data), _HASH_BYTES)]
    base = n * tiles.WIDTH
    if level == 0:
        return [
            merkle.leaf_hash(data) for data in commitments(connection, base + start, base + end)
        ]
    rows = all_rows(
        connection,
        "SELECT root FROM tile WHERE level = ? AND n >= ? AND n < ? ORDER BY n",
        (level - 1, base + start, base + end),
    )
    return [bytes(root) for (root,) in rows]


def commitments(connection: Connection, start: int, end: int) -> list[bytes]:
    """The leaves from `start` to before `end`, or as many as there are."""
    rows = all_rows(
        connection,
        "SELECT commitment FROM leaf WHERE leaf >= ? AND leaf < ? ORDER BY leaf",
        (start, end),
    )
    return [bytes(data) for (data,) in rows]


def tile_bytes(connection: Connection, name: TileName, size: int) -> bytes | None:
    """A tile as it is served, out of a log of `size` leaves; None when that has no such tile."""
    level = name.level or 0
    if (name.n * tiles.WIDTH + name.width) << (tiles.HEIGHT * level) > size:
        return None
    if name.level is None:
        base = name.n * tiles.WIDTH
        return tiles.encode_entries(commitments(connection, base, base + name.width))
    return b"".join(read_tile(connection, level, name.n, 0, name.width))


def load_edge(connection: Connection, size: int) -> Edge:
    """What a writer needs to go on from `size` leaves. Raises LumarisError `internal`."""
    found = [
        read_tile(connection, level, size >> (tiles.HEIGHT * (level + 1)), 0, width)
        for level, width in enumerate(tiles.edge_widths(size))
    ]
    try:
        return Edge(size, found)
    except ValueError:
        raise LumarisError("internal", f"The receipts log has a gap before {size}.") from None


def save_tile(connection: Connection, tile: FullTile) -> None:
    """Keep a tile that is full."""
    connection.execute(
        "INSERT INTO tile (level, n, hashes, root) VALUES (?, ?, ?, ?)",
        (tile.level, tile.n, tile.hashes, tile.root),
    )


class Proofs:
    """Proofs over committed leaves. Several threads may ask; one at a time is served."""

    def __init__(self) -> None:
        self._tree, self._lock = TileTree(), threading.Lock()

    def root(self, connection: Connection, size: int) -> bytes:
        """The tree head over the first `size` leaves. Raises LumarisError `not_found`."""
        return self._ask(connection, lambda read: self._tree.root(size, read))

    def inclusion(self, connection: Connection, index: int, size: int) -> list[bytes]:
        """The audit path of a leaf. Raises LumarisError `not_found`."""
        return self._ask(connection, lambda read: self._tree.inclusion_proof(index, size, read))

    def consistency(self, connection: Connection, old: int, new: int) -> list[bytes]:
        """The proof that `new` leaves extend `old`. Raises LumarisError `not_found`."""
        return self._ask(connection, lambda read: self._tree.consistency_proof(old, new, read))

    def _ask(self, connection: Connection, prove: Callable[[ReadTile], T]) -> T:
        with self._lock:
            try:
                return prove(partial(read_tile, connection))
            except ValueError:
                raise LumarisError("not_found", "The log does not have that size.") from None
