"""Money out of an escrow: to the seller less the fee, and at the end the rest to the buyer.

Runs inside an operation of the writer. What is paid never falls, and seller's part and fee of
several payments are those of their sum, so that the receipt's amounts are exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import account_of
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
    connection: Connection, escrow: Escrow, contract: Contract, total: int, *, kind: str, now: int
) -> Escrow:
    """Pay the seller what `total` exceeds that was paid before; nothing when it does not."""
    paid = max(escrow.paid, total)
    if paid > escrow.paid:
        legs = _to_seller(connection, escrow, contract, paid)
        move(connection, kind=kind, ref=escrow.session, legs=legs, now=now)
    return replace(escrow, paid=paid)


def finish(
    context: Context,
    connection: Connection,
    escrow: Escrow,
    contract: Contract,
    *,
    outcome: Outcome,
    now: int,
    total: int,
) -> Escrow:
    """Empty the escrow's account: to the seller up to `total` in all, the rest to the buyer; and
    log the receipt of it. After a ruling the outcome is "ruled", unless both closed."""
    after = replace(escrow, paid=max(escrow.paid, total))
    store.save_settlement(connection, after)
    if outcome != "closed" and store.rulings(connection, escrow.agreement_hash):
        outcome = "ruled"
    receipt = settlement.make_receipt(
        contract,
        cap_nanos=after.cap,
        paid_nanos=after.paid,
        voucher_hash=digest(after.voucher) if after.voucher is not None else None,
        outcome=outcome,
        now=now,
    )
    buyer = account_of(connection, escrow.buyer)
    assert buyer is not None
    refund = Leg(escrow.account, wallet(buyer, escrow.currency), receipt.refund_nanos)
    legs = [*_to_seller(connection, escrow, contract, after.paid), refund]
    move(connection, kind="settle", ref=escrow.session, legs=legs, now=now)
    key = context.keys.signer(contract.agreement.coordinator)
    append(connection, codec.sign(receipt, key, context.settings.network))
    return after


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


def _to_seller(connection: Connection, escrow: Escrow, contract: Contract, paid: int) -> list[Leg]:
    """The legs that raise what is paid to `paid`."""
    fee_bps = contract.agreement.fee_bps
    seller_before, fee_before = split_fee(escrow.paid, fee_bps=fee_bps)
    seller_after, fee_after = split_fee(paid, fee_bps=fee_bps)
    seller = account_of(connection, escrow.seller)
    assert seller is not None
    return [
        Leg(escrow.account, wallet(seller, escrow.currency), seller_after - seller_before),
        Leg(escrow.account, wallet(FEES, escrow.currency), fee_after - fee_before),
    ]
