"""What is put into the log, and the files that prove it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.receipts.cosignatures import best_head, signed_note
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.receipts.tree import Head
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import codec, merkle, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from lumaris_protocol.messages.receipt import LogProof, Receipt, ReceiptBundle

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller


# The receipt of an agreement with the newest head, and the largest that has a cosignature.
_FILED: Final = (
    "SELECT leaf, salt, envelope, head.size, note,"
    " (SELECT coalesce(max(size), 0) FROM cosignature)"
    " FROM receipt, (SELECT size, note FROM checkpoint ORDER BY size DESC LIMIT 1) AS head"
    " WHERE agreement_hash = ?"
)


@dataclass(frozen=True)
class Filed:
    """A document and its place in the log. Without the salt its leaf says nothing about it."""

    leaf: int
    salt: bytes
    envelope: bytes

    @property
    def commitment(self) -> bytes:
        """What stands in the log for it."""
        return merkle.commitment(self.salt, self.envelope)


def append(connection: Connection, receipt: codec.Signed[Receipt]) -> None:
    """Give a receipt its leaf. The batch's checkpoint covers it in the same transaction."""
    filed = _next(connection, receipt.data)
    connection.execute(
        "INSERT INTO receipt (leaf, id, agreement_hash, salt, envelope) VALUES (?, ?, ?, ?, ?)",
        (
            filed.leaf,
            receipt.message.receipt,
            receipt.message.agreement_hash,
            filed.salt,
            filed.envelope,
        ),
    )


def append_document(connection: Connection, envelope: bytes) -> Filed:
    """Give any other signed document its leaf; the same bytes keep the leaf they have."""
    held = find_document(connection, digest(envelope))
    if held is not None:
        return held
    filed = _next(connection, envelope)
    connection.execute(
        "INSERT INTO logged (leaf, hash, salt, envelope) VALUES (?, ?, ?, ?)",
        (filed.leaf, digest(envelope), filed.salt, envelope),
    )
    return filed


def find_document(connection: Connection, name: str) -> Filed | None:
    """A document that `append_document` was given, by its hash (`sha256:…`)."""
    return _filed(
        first(connection, "SELECT leaf, salt, envelope FROM logged WHERE hash = ?", (name,))
    )


def _filed(row: tuple[object, ...] | None) -> Filed | None:
    if row is None:
        return None
    leaf, salt, envelope = row
    assert isinstance(leaf, int)
    assert isinstance(salt, bytes)
    assert isinstance(envelope, bytes)
    return Filed(leaf, salt, envelope)


def _next(connection: Connection, envelope: bytes) -> Filed:
    salt = os.urandom(merkle.SALT_BYTES)
    row = first(
        connection,
        "INSERT INTO leaf (leaf, commitment)"
        " VALUES ((SELECT coalesce(max(leaf) + 1, 0) FROM leaf), ?) RETURNING leaf",
        (merkle.commitment(salt, envelope),),
    )
    assert row is not None
    return Filed(int(row[0]), salt, envelope)


class Receipts:
    """Reads receipts out of the store."""

    def __init__(self, context: Context, log: ReceiptLog) -> None:
        self._context, self._log = context, log

    async def bundle_of(self, receipt: str, caller: Caller) -> bytes:
        """A party's receipt file. Raises LumarisError `not_found`, for a stranger as well: who
        traded with whom is the parties' own business."""
        return await self._context.store.read(
            lambda connection: self._find_bundle(connection, receipt, caller)
        )

    def _find_bundle(self, connection: Connection, receipt: str, caller: Caller) -> bytes:
        row = first(
            connection,
            "SELECT receipt.agreement_hash, buyer, seller FROM receipt"
            " JOIN escrow ON escrow.agreement_hash = receipt.agreement_hash WHERE receipt.id = ?",
            (receipt,),
        )
        if row is None or not caller.may_see(row[1], row[2]):
            raise LumarisError("not_found", "There is no such receipt of yours.")
        escrow = escrows.find(connection, str(row[0]))
        assert escrow is not None, "the query above joins it"
        return self._bundle(connection, escrow)

    async def file(self, escrow: Escrow) -> bytes:
        """The receipt file of a settled escrow. Raises LumarisError `not_found`."""
        return await self._context.store.read(lambda connection: self._bundle(connection, escrow))

    def prove(self, connection: Connection, filed: Filed) -> tuple[LogProof, str]:
        """A document's place in the log: the proof, and the checkpoint it leads to with the
        cosignatures that there are."""
        cosigned = best_head(connection, after=filed.leaf)
        head = self._log.standing(cosigned) if cosigned else self._log.head(connection)
        proof = self._log.prove(connection, filed.leaf, filed.commitment, head)
        return proof, signed_note(connection, head) if cosigned else head.note

    def _bundle(self, connection: Connection, escrow: Escrow) -> bytes:
        row = first(connection, _FILED, (escrow.agreement_hash,))
        filed = _filed(row and row[:3])
        if row is None or filed is None:
            raise LumarisError("not_found", "There is no such receipt.")
        size, note, cosigned = int(row[3]), str(row[4]), int(row[5])
        if cosigned > filed.leaf:
            proof, note = self.prove(connection, filed)
        else:
            head = self._log.standing(Head(size, note))
            proof = self._log.prove(connection, filed.leaf, filed.commitment, head)
            note = head.note
        return receipts.encode_bundle(self._file(connection, escrow, filed, proof, note))

    def _file(
        self, connection: Connection, escrow: Escrow, filed: Filed, proof: LogProof, note: str
    ) -> ReceiptBundle:
        papers = escrows.enclosed(connection, escrow)
        return ReceiptBundle(
            format="lumaris-receipt/1",
            network=self._context.settings.network,
            receipt=filed.envelope,
            agreement_by_buyer=escrow.by_buyer,
            agreement_by_seller=escrow.by_seller,
            grant=escrow.budget_grant,
            voucher=escrow.voucher,
            closes=papers.closes,
            amendments=papers.amendments,
            rulings=papers.rulings,
            salt=filed.salt,
            proof=proof,
            checkpoint=note,
        )
