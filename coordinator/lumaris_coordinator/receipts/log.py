"""The RFC 6962 log over the receipt table, with one signed checkpoint per batch.

The writer's thread appends, inside the transaction that adds the receipts; the event loop reads
the published head, which changes only after the commit. A tree grows at its end only, so proofs
for the published size are not disturbed by leaves that follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import merkle
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.merkle import Checkpoint, Tree
from lumaris_protocol.messages.receipt import LogProof


@dataclass(frozen=True)
class Head:
    """What the public may see: a tree, the size that is committed, its signed note."""

    tree: Tree
    size: int
    note: str


class ReceiptLog:
    """A hook of the writer. Only `head` is read by other threads."""

    def __init__(self, *, network: str, key: KeyPair) -> None:
        self.origin = f"lumaris.{network}/log"
        self._key = key
        self._tree = Tree()
        self._next: Head | None = None
        self.head = Head(Tree(), 0, "")

    def opened(self, connection: Connection) -> None:
        """Rebuild the tree from the table. Raises LumarisError when it is not the one signed."""
        tree = Tree()
        for leaf, envelope in connection.execute(
            "SELECT leaf, envelope FROM receipt ORDER BY leaf"
        ):
            if tree.append(merkle.leaf_hash(envelope)) != leaf:
                raise LumarisError("internal", f"The receipts log has a gap before leaf {leaf}.")
        row = first(connection, "SELECT size, note FROM checkpoint ORDER BY size DESC LIMIT 1")
        size = int(row[0]) if row else 0
        note = str(row[1]) if row else self._sign(tree)
        signed = merkle.open_checkpoint(note, self._key.public_key)
        if size != len(tree) or signed.root != tree.root() or signed.size != size:
            raise LumarisError("internal", "The receipts log is not the one last signed.")
        self._tree, self._next = tree, None
        self.head = Head(tree, size, note)

    def before_commit(self, connection: Connection, now: int) -> None:
        """Append the batch's receipts and store the checkpoint over them, when there are any."""
        size = len(self._tree)
        for (envelope,) in connection.execute(
            "SELECT envelope FROM receipt WHERE leaf >= ? ORDER BY leaf", (size,)
        ):
            self._tree.append(merkle.leaf_hash(envelope))
        if len(self._tree) == size:
            return
        note = self._sign(self._tree)
        connection.execute(
            "INSERT INTO checkpoint (size, note, at) VALUES (?, ?, ?)", (len(self._tree), note, now)
        )
        self._next = Head(self._tree, len(self._tree), note)

    def committed(self) -> None:
        """Publish what is now durable."""
        if self._next is not None:
            self.head, self._next = self._next, None

    def prove(self, leaf: int) -> tuple[LogProof, str]:
        """The inclusion proof of a leaf and the checkpoint it leads to."""
        head = self.head
        if leaf >= head.size:
            raise LumarisError("busy", "The receipt is being written.")
        hashes = head.tree.inclusion_proof(leaf, head.size)
        proof = LogProof(
            index=leaf, size=head.size, hashes=tuple(map(merkle.digest_of_hash, hashes))
        )
        return proof, head.note

    def consistency(self, old: int, new: int) -> list[str]:
        """The proof that the log of `new` leaves extends that of `old`.

        Raises LumarisError `not_found` for sizes that the log never had.
        """
        head = self.head
        if not 0 < old <= new <= head.size:
            raise LumarisError("not_found", f"The log has {head.size} leaves.")
        return [merkle.digest_of_hash(node) for node in head.tree.consistency_proof(old, new)]

    def _sign(self, tree: Tree) -> str:
        return merkle.sign_checkpoint(Checkpoint(self.origin, len(tree), tree.root()), self._key)
