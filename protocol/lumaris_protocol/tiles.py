"""The log as tiles (C2SP tlog-tiles): 256 hashes each, immutable once they are full.

Tile `n` of level `l` holds the hashes of 256 subtrees of 256**l leaves each. `Edge` is all that a
writer needs to go on: the tiles that are not full, and the complete subtrees before the end.
`TileTree` makes proofs and reads only the tiles on the way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lumaris_protocol.merkle import EMPTY_ROOT, Tree, node_hash

HEIGHT: Final = 8
WIDTH: Final = 1 << HEIGHT
LEVEL_MAX: Final = 63
_INDEX_PARTS_MAX: Final = 6  # 10**18 tiles
# An opened tile is 511 hashes, some 40 kB: enough for the ways to many old leaves at once.
_TILES_OPEN_MAX: Final = 64

ReadTile = Callable[[int, int, int, int], Sequence[bytes]]
"""`read(level, n, start, end)`: the hashes of a tile from `start` to before `end`."""


@dataclass(frozen=True)
class FullTile:
    """A tile that will not change any more, and the hash that it is in the level above."""

    level: int
    n: int
    hashes: bytes
    root: bytes


class Edge:
    """The growing end of a log. Memory is O(256 log n), an append costs two hashes on average."""

    def __init__(self, size: int = 0, tiles: Sequence[Sequence[bytes]] = ()) -> None:
        """`tiles[l]` is what the tile at the end of level `l` holds for this size.

        Raises ValueError when their lengths do not follow from the size.
        """
        self.size = size
        self._tiles = [list(tile) for tile in tiles]
        if [len(tile) for tile in self._tiles] != edge_widths(size):
            raise ValueError("the tiles are not those of a log of that size")
        self._complete: dict[int, bytes] = {}  # height -> the complete subtree of a bit of the size
        for level, tile in enumerate(self._tiles):
            start = 0
            for height in range(HEIGHT - 1, -1, -1):
                if len(tile) >> height & 1:
                    chunk = tile[start : start + (1 << height)]
                    self._complete[level * HEIGHT + height] = Tree(chunk).root()
                    start += 1 << height

    def append(self, leaf: bytes) -> list[FullTile]:
        """Add a leaf hash; the tiles that it fills."""
        full: list[FullTile] = []
        self._push(0, leaf)
        node, height = leaf, 0
        while self.size >> height & 1:
            node = node_hash(self._complete.pop(height), node)
            height += 1
            if height % HEIGHT == 0:
                level = height // HEIGHT - 1
                n = self.size >> height
                full.append(FullTile(level, n, b"".join(self._tiles[level]), node))
                self._tiles[level].clear()
                self._push(level + 1, node)
        self._complete[height] = node
        self.size += 1
        return full

    def root(self) -> bytes:
        """The tree head."""
        found: bytes | None = None
        for height in sorted(self._complete):
            left = self._complete[height]
            found = left if found is None else node_hash(left, found)
        return EMPTY_ROOT if found is None else found

    def _push(self, level: int, node: bytes) -> None:
        if level == len(self._tiles):
            self._tiles.append([])
        self._tiles[level].append(node)


class TileTree:
    """Proofs from tiles, with the tiles used last kept open. For one caller at a time."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, int], Tree] = OrderedDict()

    def root(self, size: int, read: ReadTile) -> bytes:
        """The tree head over the first `size` leaves. Raises ValueError when a tile is short."""
        return self._range(0, size, read) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int, read: ReadTile) -> list[bytes]:
        """RFC 6962 audit path of leaf `index` in the tree of `size` leaves. Raises ValueError."""
        if not 0 <= index < size:
            raise ValueError("no such leaf in a tree of that size")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end, read))
                end = middle
            else:
                path.append(self._range(start, middle, read))
                start = middle
        return path[::-1]

    def consistency_proof(self, old: int, size: int, read: ReadTile) -> list[bytes]:
        """RFC 6962 proof that the first `old` leaves are unchanged at `size`. Raises ValueError."""
        if not 0 < old <= size:
            raise ValueError("the old size is not between 1 and the new size")
        path: list[bytes] = []
        start, end, whole = 0, size, True
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._range(middle, end, read))
                end = middle
            else:
                path.append(self._range(start, middle, read))
                start, whole = middle, False
        if not whole:
            path.append(self._range(start, end, read))
        return path[::-1]

    def _range(self, start: int, end: int, read: ReadTile) -> bytes:
        width = end - start
        if width & (width - 1) == 0 and start % width == 0:
            return self._node(width.bit_length() - 1, start // width, read)
        middle = start + _split(width)
        return node_hash(self._range(start, middle, read), self._range(middle, end, read))

    def _node(self, height: int, index: int, read: ReadTile) -> bytes:
        """The hash of a complete subtree: a node inside the tile of its level."""
        level, inside = divmod(height, HEIGHT)
        first = index << inside
        n, offset = divmod(first, WIDTH)
        tile = self._tile(level, n, offset + (1 << inside), read)
        return tile.node(inside, offset >> inside)

    def _tile(self, level: int, n: int, width: int, read: ReadTile) -> Tree:
        tile = self._open.pop((level, n), None)
        tile = Tree() if tile is None else tile
        if len(tile) < width:
            found = read(level, n, len(tile), WIDTH)
            if len(tile) + len(found) < width:
                raise ValueError("the log's tiles are shorter than its size")
            for node in found:
                tile.append(node)
        self._open[level, n] = tile
        if len(self._open) > _TILES_OPEN_MAX:
            self._open.popitem(last=False)
        return tile


@dataclass(frozen=True)
class TileName:
    """What a tile's path names: `level` None is a bundle of entries; `width` 256 is a full one."""

    level: int | None
    n: int
    width: int

    @property
    def path(self) -> str:
        """The path below `tile/`."""
        digits = f"{self.n:03d}"
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        parts = [digits[at : at + 3] for at in range(0, len(digits), 3)]
        index = "/".join([f"x{part}" for part in parts[:-1]] + parts[-1:])
        level = "entries" if self.level is None else str(self.level)
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"{level}/{index}{partial}"


def parse_path(path: str) -> TileName | None:
    """The tile that a path below `tile/` names, or None: there is one path for each tile."""
    level, _, rest = path.partition("/")
    index, dot, width = rest.partition(".p/")
    parts = index.split("/")
    digits = "".join(part.removeprefix("x") for part in parts)
    shown = (level if level != "entries" else "0", digits, width if dot else "1")
    if len(parts) > _INDEX_PARTS_MAX or not all(t.isascii() and t.isdigit() for t in shown):
        return None
    if len(level) > len("entries") or len(digits) != 3 * len(parts) or len(width) > 3:
        return None
    number = None if level == "entries" else int(level)
    name = TileName(number, int(digits), int(width) if dot else WIDTH)
    possible = (number or 0) <= LEVEL_MAX and 1 <= name.width <= WIDTH
    return name if possible and name.path == path else None


def edge_widths(size: int) -> list[int]:
    """How many hashes the last tile of each level holds in a log of that size; 0 after a full."""
    widths: list[int] = []
    while size:
        widths.append(size % WIDTH)
        size //= WIDTH
    return widths


def encode_entries(entries: Sequence[bytes]) -> bytes:
    """An entry bundle: each entry after its length in two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def _split(width: int) -> int:
    return 1 << ((width - 1).bit_length() - 1)
