"""Tiles, their names and the proofs made from them, against the whole tree."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_protocol import merkle, tiles
from lumaris_protocol.tiles import Edge, TileName, TileTree
from tests import independent_log as other

LEAVES = [merkle.leaf_hash(str(n).encode()) for n in range(1_500)]
WHOLE = merkle.Tree(LEAVES)


class Shelf:
    """Tiles in memory, as a log would keep them, and how many were read."""

    def __init__(self, size: int) -> None:
        self.edge, self.full = Edge(), {}
        self.leaves = LEAVES[:size]
        self.reads = 0
        for leaf in self.leaves:
            for tile in self.edge.append(leaf):
                self.full[tile.level, tile.n] = tile

    def read(self, level: int, n: int, start: int, end: int) -> Sequence[bytes]:
        self.reads += 1
        if (level, n) in self.full:
            data = self.full[level, n].hashes
            found = [data[at : at + 32] for at in range(0, len(data), 32)]
        elif level == 0:
            found = self.leaves[n * 256 : (n + 1) * 256]
        else:
            found = []
            while (level - 1, n * 256 + len(found)) in self.full:
                found.append(self.full[level - 1, n * 256 + len(found)].root)
        return found[start:end]

    def edge_tiles(self) -> list[Sequence[bytes]]:
        size = len(self.leaves)
        return [
            self.read(level, size >> 8 * (level + 1), 0, width)
            for level, width in enumerate(tiles.edge_widths(size))
        ]


SHELF = Shelf(1_500)


def test_the_edge_has_the_root_of_the_whole_tree_at_every_size() -> None:
    edge = Edge()
    assert edge.root() == merkle.EMPTY_ROOT
    for size, leaf in enumerate(LEAVES[:600], 1):
        edge.append(leaf)
        assert edge.root() == WHOLE.root(size)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 513, 1_280, 1_499])
def test_an_edge_goes_on_from_tiles(size: int) -> None:
    edge = Edge(size, Shelf(size).edge_tiles())
    assert edge.root() == WHOLE.root(size) == other.tree_head(LEAVES[:size])
    made = [tile for leaf in LEAVES[size:] for tile in edge.append(leaf)]
    assert edge.root() == WHOLE.root()
    assert made == [SHELF.full[tile.level, tile.n] for tile in made]


@pytest.mark.parametrize("size", [1, 256, 300])
def test_an_edge_does_not_start_from_other_tiles(size: int) -> None:
    found = Shelf(size).edge_tiles()
    with pytest.raises(ValueError, match="tiles"):
        Edge(size + 1, found)


def test_a_tile_holds_what_the_definition_says() -> None:
    """The n-th tile of level l is MTH(D[(n * 256 + i) * 256**l : (n * 256 + i + 1) * 256**l])."""
    assert sorted(SHELF.full) == [(0, n) for n in range(5)]
    for (_, n), tile in SHELF.full.items():
        assert tile.hashes == b"".join(LEAVES[n * 256 : (n + 1) * 256])
        assert tile.root == other.tree_head(LEAVES[n * 256 : (n + 1) * 256])
    roots = [other.tree_head(LEAVES[n * 256 : (n + 1) * 256]) for n in range(5)]
    assert SHELF.read(1, 0, 0, 256) == roots
    assert tiles.edge_widths(70_000) == [112, 17, 1]
    assert tiles.edge_widths(256) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_proofs_from_tiles_are_those_of_the_whole_tree(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    tree = TileTree()
    path = tree.inclusion_proof(index, size, SHELF.read)
    assert path == WHOLE.inclusion_proof(index, size)
    assert other.root_from_path(LEAVES[index], index, size, path) == WHOLE.root(size)
    proof = tree.consistency_proof(old, size, SHELF.read)
    assert proof == WHOLE.consistency_proof(old, size)
    roots = other.roots_from_proof(old, size, proof, WHOLE.root(old))
    assert roots == (WHOLE.root(old), WHOLE.root(size))
    assert tree.root(size, SHELF.read) == WHOLE.root(size)


def test_a_proof_reads_the_tiles_on_its_way_once() -> None:
    shelf, tree = Shelf(1_500), TileTree()
    shelf.reads = 0
    tree.inclusion_proof(3, 1_500, shelf.read)
    assert shelf.reads == 3
    tree.inclusion_proof(4, 1_500, shelf.read)
    assert shelf.reads == 3


def test_a_tile_that_grew_is_read_on() -> None:
    tree = TileTree()
    assert tree.root(5, Shelf(5).read) == WHOLE.root(5)
    assert tree.root(1_400, SHELF.read) == WHOLE.root(1_400)


def test_missing_tiles_are_no_proof() -> None:
    with pytest.raises(ValueError, match="shorter"):
        TileTree().root(1_501, SHELF.read)
    for index, size in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="no such leaf"):
            TileTree().inclusion_proof(index, size, SHELF.read)
    for old in (0, 6):
        with pytest.raises(ValueError, match="old size"):
            TileTree().consistency_proof(old, 5, SHELF.read)


def test_memory_is_bounded() -> None:
    """Many tiles of a large log: only the ones used last stay open."""
    tree = TileTree()
    for n in range(100):
        tree._tile(0, n, 1, lambda *_: LEAVES[:1])
    assert len(tree._open) <= tiles._TILES_OPEN_MAX


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (TileName(0, 0, 256), "0/000"),
        (TileName(0, 0, 1), "0/000.p/1"),
        (TileName(1, 1_234_067, 256), "1/x001/x234/067"),
        (TileName(63, 999, 255), "63/999.p/255"),
        (TileName(None, 1_000, 256), "entries/x001/000"),
        (TileName(None, 7, 3), "entries/007.p/3"),
    ],
)
def test_a_tile_has_one_path(name: TileName, path: str) -> None:
    assert name.path == path
    assert tiles.parse_path(path) == name


@given(
    st.one_of(st.none(), st.integers(0, 63)),
    st.integers(0, 10**18 - 1),
    st.integers(1, 256),
)
def test_paths_go_round(level: int | None, n: int, width: int) -> None:
    name = TileName(level, n, width)
    assert tiles.parse_path(name.path) == name


@pytest.mark.parametrize(
    "path",
    [
        "",
        "0",
        "0/",
        "0/0",
        "0/0000",
        "00/000",
        "64/000",
        "-1/000",
        "0/x000/000",
        "0/001/000",
        "0/x001/x000",
        "0/000.p/0",
        "0/000.p/01",
        "0/000.p/256",
        "0/000.p/",
        "0/000.p/1.p/1",
        "0/000/",
        "entries/000.p/x",
        "entry/000",
        "0/\u0660\u0660\u0660",
        "0/../000",
        "0/" + "x999/" * 6 + "999",
    ],
)
def test_other_paths_name_nothing(path: str) -> None:
    assert tiles.parse_path(path) is None


def test_entries_are_length_prefixed() -> None:
    assert tiles.encode_entries([b"ab", b"", b"c" * 300]) == (
        b"\x00\x02ab" + b"\x00\x00" + b"\x01\x2c" + b"c" * 300
    )
