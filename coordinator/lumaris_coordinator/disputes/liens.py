"""Several disputes over one bond: whoever came first is served first, also after its ruling.

A ruling collects what there is. What it misses because of other disputes over that bond is owed: it
is taken from the bond when it comes back, before later disputes and releases. Runs inside an
operation of the writer.
"""

from __future__ import annotations

from lumaris_coordinator.bounds import LIENS_PER_ROUND_MAX
from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import FEES, wallet
from lumaris_coordinator.store.port import Connection


def left(connection: Connection, peer: str, currency: str, *, number: int | None = None) -> int:
    """Nanos of a peer's bond for the dispute of this number, or for a new one: what lies there
    without what earlier disputes may still take."""
    earlier = store.awaited(connection, peer, currency, before=number)
    return max(0, bonds.free(connection, peer, currency) - earlier)


def later(connection: Connection, dispute: Dispute) -> int:
    """Nanos that a ruling without enough may still get: what other open disputes hold of the
    respondent's bond or may still take, and no ruling is owed yet."""
    peer, currency = dispute.respondent, dispute.currency
    there = bonds.free(connection, peer, currency) + store.held_by_others(connection, dispute)
    return max(0, there - store.owed_in_all(connection, peer, currency))


def cut(connection: Connection, agreement_hash: str, refundable: int) -> None:
    """Owe no more refunds on an agreement than can still be given back, the earliest first."""
    for dispute in store.owed_about(connection, agreement_hash):
        refund = min(dispute.owed_refund, refundable)
        owed = dispute.owed - (dispute.owed_refund - refund)
        store.set_owed(connection, dispute.id, owed=owed, refund=refund, paid=0)
        refundable -= refund


def serve(connection: Connection, peer: str, currency: str, *, now: int) -> None:
    """Pay what is owed from what has come to a bond, the earliest first, up to a bound."""
    for dispute in store.owed_by(connection, peer, currency, limit=LIENS_PER_ROUND_MAX):
        there = left(connection, peer, currency, number=dispute.number)
        if there:
            _collect(connection, dispute, min(dispute.owed, there), now=now)


def _collect(connection: Connection, dispute: Dispute, amount: int, *, now: int) -> None:
    """The refund first; of the rest half to the opener, as at a ruling."""
    refund = min(amount, dispute.owed_refund)
    victim = (amount - refund) // 2
    bond = bonds.account_of_bond(dispute.respondent, dispute.currency)
    bonds.take(connection, source=bond, ref=dispute.id, amount=amount, now=now)
    parts = (
        (bonds.wallet_of(connection, dispute.buyer, dispute.currency), refund),
        (bonds.wallet_of(connection, dispute.opener, dispute.currency), victim),
        (wallet(FEES, dispute.currency), amount - refund - victim),
    )
    bonds.give_out(connection, ref=dispute.id, parts=parts, now=now)
    store.set_owed(
        connection,
        dispute.id,
        owed=dispute.owed - amount,
        refund=dispute.owed_refund - refund,
        paid=refund,
    )
    emit(
        connection,
        "dispute.collected",
        ref=dispute.id,
        parties=(dispute.buyer, dispute.seller),
        body={
            "agreement_hash": dispute.agreement_hash,
            "collected_nanos": amount,
            "refund_nanos": refund,
            "owed_nanos": dispute.owed - amount,
        },
        now=now,
    )
