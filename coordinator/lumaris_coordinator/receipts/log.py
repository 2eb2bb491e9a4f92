"""The RFC 6962 log of what the coordinator signed, with one signed checkpoint per batch.

The writer's thread appends in the transaction that adds the leaves, and keeps no more in memory
than the edge of the tree. Everybody else reads committed rows, so a proof is never of something
that could still be rolled back, and every replica sees the same log.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lumaris_coordinator.identity import shared_list
from lumaris_coordinator.receipts import tree
from lumaris_coordinator.receipts.tree import Head, Proofs
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol import merkle, notes, tiles
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import KeyPair, public_key_of
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.messages.receipt import LogProof
from lumaris_protocol.tiles import Edge

if TYPE_CHECKING:
    from lumaris_coordinator.identity.keys import KeyRing


class ReceiptLog:
    """A hook of the writer, and what reads the log out of any connection."""

    def __init__(
        self,
        *,
        network: str,
        key: Callable[[], KeyPair],
        known: Callable[[], Iterable[str]],
        revoked: Callable[[], Iterable[str]] = tuple,
        shared: Callable[[Connection], Iterable[str]] = lambda _: (),
    ) -> None:
        """`key` is the one that signs now; `known` are the peer ids of all that ever did, and those
        that are `revoked` may sign for somebody else. `shared` finds in the data those that other
        replicas made known."""
        self.network, self.origin = network, notes.log_origin(network)
        self._key, self._known, self._revoked = key, known, revoked
        self._shared = shared
        self._edge = Edge()
        self.proofs = Proofs()

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The public keys that a head in this store may be signed with."""
        return tuple(map(public_key_of, self._known()))

    @property
    def trusted_keys(self) -> tuple[bytes, ...]:
        """Those of them whose word counts when somebody else shows it."""
        revoked = set(map(public_key_of, self._revoked()))
        return tuple(key for key in self.keys if key not in revoked)

    # --- the writer's hook ---

    def opened(self, connection: Connection) -> None:
        """Find the end of the log. Raises LumarisError `internal` when it is not the one signed.

        Costs the same for any size: what lies further back is looked at by `audit`.
        """
        self._edge = self._load(connection)
        row = first(connection, "SELECT coalesce(max(leaf) + 1, 0) FROM leaf")
        if row is None or int(row[0]) != self._edge.size:
            raise LumarisError("internal", "The receipts log is not the one last signed.")
        start = max(0, self._edge.size - tiles.WIDTH)
        if changed(connection, start, self._edge.size):
            raise LumarisError("internal", "The receipts log is not the one last signed.")

    def followed(self, connection: Connection) -> None:
        """Take over what other replicas have committed. Raises LumarisError as `opened`."""
        head = tree.newest(connection)
        if head is not None and head.size != self._edge.size:
            self._edge = self._load(connection)

    def before_commit(self, connection: Connection, now: int) -> None:
        """Put the batch's leaves into the tree and sign it, when there are any."""
        edge, before = self._edge, self._edge.size
        rows = all_rows(
            connection, "SELECT commitment FROM leaf WHERE leaf >= ? ORDER BY leaf", (before,)
        )
        for (commitment,) in rows:
            for full in edge.append(merkle.leaf_hash(bytes(commitment))):
                tree.save_tile(connection, full)
        if rows:
            connection.execute(
                "INSERT INTO checkpoint (size, note, at) VALUES (?, ?, ?)",
                (edge.size, self._sign(edge), now),
            )

    def committed(self) -> None:
        """Nothing is kept back: readers see the rows."""

    # --- readers ---

    def head(self, connection: Connection) -> Head:
        """The newest signed head."""
        return self.standing(tree.newest(connection) or Head(0, self._sign(Edge())))

    def standing(self, head: Head) -> Head:
        """A head under a key that counts: one that was signed with a key which was revoked since is
        signed anew. The cosignatures are of the text and stay."""
        if not self._revoked():
            return head
        try:
            merkle.open_checkpoint(head.note, *self.trusted_keys)
        except EnvelopeError:
            return Head(head.size, merkle.sign_checkpoint(checkpoint_of(head), self._key()))
        return head

    def prove(self, connection: Connection, leaf: int, commitment: bytes, head: Head) -> LogProof:
        """The inclusion proof of a leaf in a head.

        Raises LumarisError `busy` for a leaf that is not in it yet, `internal` when the stored
        document is not the one that was logged.
        """
        if leaf >= head.size:
            raise LumarisError("busy", "The receipt is being written.")
        path = self.proofs.inclusion(connection, leaf, head.size)
        if not merkle.verify_inclusion(
            leaf=merkle.leaf_hash(commitment),
            index=leaf,
            size=head.size,
            path=path,
            root=checkpoint_of(head).root,
        ):
            raise LumarisError("internal", f"Leaf {leaf} is not what was logged.")
        hashes = tuple(map(merkle.digest_of_hash, path))
        return LogProof(index=leaf, size=head.size, hashes=hashes)

    def consistency(self, connection: Connection, old: int, new: int) -> list[bytes]:
        """The proof that the log of `new` leaves extends that of `old`.

        Raises LumarisError `not_found` for sizes that the log never had.
        """
        size = self.head(connection).size
        if not 0 < old <= new <= size:
            raise LumarisError("not_found", f"The log has {size} leaves.")
        return self.proofs.consistency(connection, old, new)

    def _load(self, connection: Connection) -> Edge:
        head = tree.newest(connection) or Head(0, self._sign(Edge()))
        edge = tree.load_edge(connection, head.size)
        signed = self.verified(connection, head)
        if signed != Checkpoint(self.origin, edge.size, edge.root()):
            raise LumarisError("internal", "The receipts log is not the one last signed.")
        return edge

    def verified(self, connection: Connection, head: Head) -> Checkpoint:
        """What a stored head says, signed with a key of ours or of a replica's.

        Raises EnvelopeError `bad_signature`.
        """
        try:
            return merkle.open_checkpoint(head.note, *self.keys)
        except EnvelopeError:
            shared = map(public_key_of, self._shared(connection))
            return merkle.open_checkpoint(head.note, *self.keys, *shared)

    def _sign(self, edge: Edge) -> str:
        point = Checkpoint(self.origin, edge.size, edge.root())
        return merkle.sign_checkpoint(point, self._key())


def log_of(network: str, keys: KeyRing) -> ReceiptLog:
    """The log of a coordinator's keys: the current one signs, and what any of them signed holds."""
    return ReceiptLog(
        network=network,
        key=lambda: keys.current,
        known=lambda: [keys.first.peer_id, *(key.peer for key in keys.list.message.keys)],
        revoked=lambda: [key.peer for key in keys.list.message.keys if key.revoked_at],
        shared=lambda connection: shared_list.names(connection, keys.list, network=network),
    )


def checkpoint_of(head: Head) -> Checkpoint:
    """What a head says. Its note is our own, so it is not verified again."""
    _, size, root, *_ = head.note.split("\n")
    return Checkpoint(head.note.partition("\n")[0], int(size), base64.b64decode(root))


def changed(connection: Connection, start: int, end: int) -> list[int]:
    """The leaves of a range that no stored document accounts for: the range bounds the work."""
    rows = all_rows(
        connection,
        "SELECT leaf.leaf, commitment, coalesce(receipt.salt, logged.salt),"
        " coalesce(receipt.envelope, logged.envelope) FROM leaf"
        " LEFT JOIN receipt ON receipt.leaf = leaf.leaf"
        " LEFT JOIN logged ON logged.leaf = leaf.leaf"
        " WHERE leaf.leaf >= ? AND leaf.leaf < ? ORDER BY leaf.leaf",
        (start, end),
    )
    return [
        int(leaf)
        for leaf, commitment, salt, document in rows
        if document is None
        or len(salt) != merkle.SALT_BYTES
        or merkle.commitment(bytes(salt), bytes(document)) != bytes(commitment)
    ]
