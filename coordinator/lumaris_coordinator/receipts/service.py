"""Receipt files: a settlement's documents with their place in the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import codec, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.receipt import Receipt, ReceiptBundle

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller


@dataclass(frozen=True)
class Filed:
    """A receipt and its place in the log."""

    leaf: int
    envelope: bytes


def append(connection: Connection, receipt: codec.Signed[Receipt]) -> None:
    """Give a receipt its leaf. The batch's checkpoint covers it in the same transaction."""
    connection.execute(
        "INSERT INTO receipt (leaf, id, agreement_hash, envelope)"
        " VALUES ((SELECT coalesce(max(leaf) + 1, 0) FROM receipt), ?, ?, ?)",
        (receipt.message.receipt, receipt.message.agreement_hash, receipt.data),
    )


def find(connection: Connection, agreement_hash: str) -> Filed | None:
    """The receipt of an agreement, if it is settled."""
    row = first(
        connection, "SELECT leaf, envelope FROM receipt WHERE agreement_hash = ?", (agreement_hash,)
    )
    return Filed(*row) if row else None


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
            "SELECT escrow.agreement_hash FROM receipt JOIN escrow USING (agreement_hash)"
            " WHERE receipt.id = ? AND ? IN (buyer, seller)",
            (receipt, caller.peer),
        )
        escrow = escrows.find(connection, str(row[0])) if row else None
        filed = find(connection, escrow.agreement_hash) if escrow else None
        if escrow is None or filed is None:
            raise LumarisError("not_found", "There is no such receipt of yours.")
        return self.bundle(escrow, filed)

    def bundle(self, escrow: Escrow, filed: Filed) -> bytes:
        """The receipt file of a settled escrow, with a proof to the newest checkpoint."""
        proof, note = self._log.prove(filed.leaf)
        return receipts.encode_bundle(
            ReceiptBundle(
                format="lumaris-receipt/1",
                network=self._context.settings.network,
                receipt=filed.envelope,
                agreement_by_buyer=escrow.by_buyer,
                agreement_by_seller=escrow.by_seller,
                grant=escrow.budget_grant,
                voucher=escrow.voucher,
                proof=proof,
                checkpoint=note,
            )
        )
