"""Money out of an escrow: to the seller less the fee, and at the end the rest to the buyer.

Runs inside an operation of the writer. What is paid never falls, and seller's part and fee of
several payments are those of their sum, so that the receipt's amounts are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.ledger.store import FEES, Leg, move, wallet
from lumaris_coordinator.receipts.service import append
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import agreements, codec, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.ids import digest
from lumaris_protocol.messages.receipt import Outcome
from lumaris_protocol.money import split_fee

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

_EVENTS: Final = {"granted": "escrow.held", "amended": "escrow.amended"}


def contract_of(context: Context, escrow: Escrow) -> Contract:
    """The agreement of an escrow, both signatures checked again."""
    return agreements.join(escrow.by_buyer, escrow.by_seller, network=context.settings.network)


def pay_up(
    connection: Connection,
    before: Escrow,
    after: Escrow,
    contract: Contract,
    *,
    kind: str,
    now: int,
) -> None:
    """Pay the seller what `paid` rose by in a move."""
    if after.paid > before.paid:
        legs = _to_seller(before, after, contract)
        move(connection, kind=kind, ref=after.session, legs=legs, now=now)


def finish(
    context: Context,
    connection: Connection,
    before: Escrow,
    after: Escrow,
    contract: Contract,
    *,
    outcome: Outcome,
    now: int,
) -> None:
    """Empty the escrow's account in its last move: to the seller what `paid` rose by, the rest to
    the buyer; and log the receipt of it. After a ruling the outcome is "ruled", unless both closed.
    """
    if outcome != "closed" and store.rulings(connection, after):
        outcome = "ruled"
    receipt = settlement.make_receipt(
        contract,
        cap_nanos=after.cap,
        paid_nanos=after.paid,
        voucher_hash=digest(after.voucher) if after.voucher is not None else None,
        outcome=outcome,
        now=now,
    )
    wallet_of_buyer = wallet(after.buyer_owner, after.currency)
    # What was returned already is part of the receipt's refund.
    refund = Leg(after.account, wallet_of_buyer, receipt.refund_nanos - after.returned)
    legs = [*_to_seller(before, after, contract), refund]
    move(connection, kind="settle", ref=after.session, legs=legs, now=now)
    key = context.keys.signer(contract.agreement.coordinator)
    append(connection, codec.sign(receipt, key, context.settings.network))


def tell(connection: Connection, escrow: Escrow, fact: str, *, now: int) -> None:
    """Tell both parties of one move of the escrow, as it stands after it."""
    emit(
        connection,
        _EVENTS.get(fact, f"escrow.{escrow.state}"),
        ref=escrow.agreement_hash,
        parties=(escrow.buyer, escrow.seller),
        body={
            "session": escrow.session,
            "fact": fact,
            "state": escrow.state,
            "version": escrow.version,
            "currency": escrow.currency,
            "cap_nanos": escrow.cap,
            "vouchered_nanos": escrow.voucher_total,
            "paid_nanos": escrow.paid,
            "settle_by": escrow.settle_by,
        },
        now=now,
    )


def _to_seller(before: Escrow, after: Escrow, contract: Contract) -> list[Leg]:
    """The legs that raise what is paid."""
    fee_bps = contract.agreement.fee_bps
    seller_before, fee_before = split_fee(before.paid, fee_bps=fee_bps)
    seller_after, fee_after = split_fee(after.paid, fee_bps=fee_bps)
    wallet_of_seller = wallet(after.seller_owner, after.currency)
    return [
        Leg(after.account, wallet_of_seller, seller_after - seller_before),
        Leg(after.account, wallet(FEES, after.currency), fee_after - fee_before),
    ]
