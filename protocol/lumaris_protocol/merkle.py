"""The RFC 6962 Merkle tree, and the C2SP signed checkpoints over it.

Leaf hash SHA-256(0x00 || data), node hash SHA-256(0x01 || left || right); an odd right edge is
promoted unchanged. The same tree names a set of files (`files_root`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lumaris_protocol import notes
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.execution import File
from lumaris_protocol.notes import NoteKey

EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
SALT_BYTES: Final = 32
_SIZE_DIGITS_MAX: Final = 18


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def commitment(salt: bytes, document: bytes) -> bytes:
    """What stands in the log for a document: without its salt it says nothing about it."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes")
    return hashlib.sha256(salt + document).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """An append-only log of leaf hashes. Complete subtrees are kept by level, so appends are O(1)
    amortised and root and proofs are O(log n)."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaves:
            self.append(leaf)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, leaf: bytes) -> int:
        """Add a leaf hash; its index."""
        index = len(self)
        self._levels[0].append(leaf)
        level = 0
        while len(self._levels[level]) % 2 == 0:
            if level + 1 == len(self._levels):
                self._levels.append([])
            left, right = self._levels[level][-2:]
            self._levels[level + 1].append(node_hash(left, right))
            level += 1
        return index

    def root(self, size: int | None = None) -> bytes:
        """The tree head over the first `size` leaves (all by default)."""
        size = len(self) if size is None else size
        self._check_size(size)
        return self._range_root(0, size) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 audit path of leaf `index` in the tree of `size` leaves."""
        size = len(self) if size is None else size
        self._check_size(size)
        if not 0 <= index < size:
            raise ValueError("no such leaf in a tree of that size")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start = middle
        return path[::-1]

    def consistency_proof(self, old: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 proof that the first `old` leaves of this tree are unchanged at `size`."""
        size = len(self) if size is None else size
        self._check_size(size)
        if not 0 < old <= size:
            raise ValueError("the old size is not between 1 and the new size")
        path: list[bytes] = []
        start, end, whole = 0, size, True
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start, whole = middle, False
        if not whole:
            path.append(self._range_root(start, end))
        return path[::-1]

    def node(self, height: int, index: int) -> bytes:
        """The hash of the complete subtree `index` of 2**height leaves. Raises IndexError."""
        return self._levels[height][index]

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= len(self):
            raise ValueError("the tree never had that size")

    def _range_root(self, start: int, end: int) -> bytes:
        width = end - start
        if width & (width - 1) == 0 and start % width == 0:
            return self._levels[width.bit_length() - 1][start // width]
        middle = start + _split(width)
        return node_hash(self._range_root(start, middle), self._range_root(middle, end))


def verify_inclusion(
    *, leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes
) -> bool:
    """Whether `leaf` (a leaf hash) is at `index` of the tree with that size and root (RFC 9162)."""
    if not 0 <= index < size:
        return False
    position, last, found = index, size - 1, leaf
    for node in path:
        if last == 0:
            return False
        if position & 1 or position == last:
            found = node_hash(node, found)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            found = node_hash(found, node)
        position, last = position >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(
    *, old: int, old_root: bytes, size: int, root: bytes, path: Sequence[bytes]
) -> bool:
    """Whether a tree of `size` extends the tree of `old` leaves (RFC 9162, section 2.1.4.2)."""
    if old == size:
        return not path and old_root == root
    if not 0 < old < size or not path:
        return False
    nodes = list(path)
    if old & (old - 1) == 0:
        nodes.insert(0, old_root)
    position, last = old - 1, size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old_found = new_found = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            old_found, new_found = node_hash(node, old_found), node_hash(node, new_found)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            new_found = node_hash(new_found, node)
        position, last = position >> 1, last >> 1
    return last == 0 and old_found == old_root and new_found == root


def files_root(files: Sequence[File]) -> str:
    """The digest that names a set of files: the tree head over their sorted lines."""
    lines = sorted(f"{file.path}\0{file.size_bytes}\0{file.sha256}".encode() for file in files)
    return f"sha256:{Tree(leaf_hash(line) for line in lines).root().hex()}"


@dataclass(frozen=True)
class Checkpoint:
    """A tree head: the log's name, its size and its root."""

    origin: str
    size: int
    root: bytes

    @property
    def body(self) -> str:
        """The text that is signed (C2SP tlog-checkpoint)."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def sign_checkpoint(checkpoint: Checkpoint, key: KeyPair) -> str:
    """The checkpoint as a C2SP signed note."""
    return f"{checkpoint.body}\n{notes.sign(checkpoint.body, key, name=checkpoint.origin)}"


def open_checkpoint(note: str, *public_keys: bytes) -> Checkpoint:
    """The checkpoint of a note that one of these keys signed as its log; others are passed over,
    and so is a false line of another of them: anybody could have added it.

    Raises EnvelopeError: `malformed`, `oversize` or `bad_signature`.
    """
    parsed = notes.parse(note)
    checkpoint = parse_checkpoint(parsed.text)
    for public_key in public_keys:
        key = NoteKey(checkpoint.origin, notes.ED25519, public_key)
        try:
            if notes.verify(parsed, key) is not None:
                return checkpoint
        except EnvelopeError:
            continue
    raise EnvelopeError("bad_signature", "The checkpoint is not signed by the expected key.")


def parse_checkpoint(text: str) -> Checkpoint:
    """The checkpoint that a note's text is. Our logs add no lines, so more are refused.

    Raises EnvelopeError `malformed`.
    """
    lines = text.split("\n")
    size = lines[1] if len(lines) == 4 and not lines[3] else ""
    if not lines[0] or not (size.isascii() and size.isdigit()):
        raise EnvelopeError("malformed", "The note is not a C2SP checkpoint.")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except ValueError:
        root = b""
    if len(size) > _SIZE_DIGITS_MAX or len(root) != 32:
        raise EnvelopeError("malformed", "The checkpoint's size or root is not valid.")
    checkpoint = Checkpoint(lines[0], int(size), root)
    if checkpoint.body != text:
        raise EnvelopeError("malformed", "The checkpoint is not spelled as it is signed.")
    return checkpoint


def _split(width: int) -> int:
    """The largest power of two below `width`."""
    return 1 << ((width - 1).bit_length() - 1)


def digest_of_hash(node: bytes) -> str:
    """A 32-byte hash in the form digests have everywhere."""
    return f"sha256:{node.hex()}"
