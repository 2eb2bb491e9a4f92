"""The whole log recomputed from its documents: for the operator's check, not for every start."""

from __future__ import annotations

from collections.abc import Iterator

from lumaris_coordinator.receipts import tree
from lumaris_coordinator.receipts.log import ReceiptLog, changed, checkpoint_of
from lumaris_coordinator.receipts.tree import Head
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol import merkle, tiles
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.tiles import Edge, FullTile, TileName

# Leaves a page: some 6 MB of documents at a time.
_PAGE = 4_096
_PROBLEMS_MAX = 100


def audit(connection: Connection, log: ReceiptLog) -> list[str]:
    """What is wrong with the log, in words, up to a hundred; nothing when every document is at its
    leaf, every tile and root follows from the leaves, and every checkpoint is signed.

    Takes some ten seconds a million leaves, and reads it in pages; use one snapshot.
    """
    problems: list[str] = []
    for problem in _look(connection, log):
        problems.append(problem)
        if len(problems) >= _PROBLEMS_MAX:
            break
    return problems


def _look(connection: Connection, log: ReceiptLog) -> Iterator[str]:
    edge, end = Edge(), log.head(connection).size
    heads = _heads(connection)
    due = next(heads, None)
    while leaves := tree.commitments(connection, edge.size, edge.size + _PAGE):
        for leaf in changed(connection, edge.size, edge.size + _PAGE):
            yield f"leaf {leaf} is not the document that is stored for it"
        for leaf_data in leaves:
            for full in edge.append(merkle.leaf_hash(leaf_data)):
                yield from _check_tile(connection, full)
            if due is not None and due.size == edge.size:
                yield from _check_head(connection, log, due, edge)
                due = next(heads, None)
    if due is not None or edge.size != end:
        yield f"the log has {edge.size} leaves, its newest checkpoint says {end}"


def _heads(connection: Connection) -> Iterator[Head]:
    """Every checkpoint in order, a page at a time."""
    last = 0
    while rows := all_rows(
        connection,
        f"SELECT size, note FROM checkpoint WHERE size > ? ORDER BY size LIMIT {_PAGE}",  # noqa: S608 - a constant
        (last,),
    ):
        for size, note in rows:
            yield Head(int(size), str(note))
        last = int(rows[-1][0])


def _check_tile(connection: Connection, full: FullTile) -> Iterator[str]:
    name = TileName(full.level, full.n, tiles.WIDTH)
    rows = all_rows(
        connection, "SELECT hashes, root FROM tile WHERE level = ? AND n = ?", (full.level, full.n)
    )
    if [(bytes(hashes), bytes(root)) for hashes, root in rows] != [(full.hashes, full.root)]:
        yield f"tile {name.path} is not what follows from the leaves"


def _check_head(connection: Connection, log: ReceiptLog, head: Head, edge: Edge) -> Iterator[str]:
    try:
        signed = log.verified(connection, head)
    except LumarisError as error:
        yield f"the checkpoint of {head.size} leaves: {error.code}"
        return
    expected = Checkpoint(log.origin, edge.size, edge.root())
    if signed != expected or checkpoint_of(head) != expected:
        yield f"the checkpoint of {head.size} leaves is of another tree"
