"""What disputes do to an escrow. Runs inside an operation of the writer.

While a dispute is open the vouchered part belongs to the seller and is paid at once; only the rest
is frozen, and when the settle window has ended only what is asked of it. A ruling gives the seller
an award from it. When the last dispute has ended, an escrow whose seller has claimed meanwhile is
settled in the same step. Otherwise it is `claimed` again: a seller that was not heard may show its
vouchers until the settle window ends, so that no dispute, whoever opened it and however soon it
ended, takes vouchered money from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumaris_coordinator.escrow import paying, store
from lumaris_coordinator.escrow.store import Change, Escrow
from lumaris_coordinator.ledger.store import Leg, move, wallet
from lumaris_coordinator.store.port import Connection
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from lumaris_protocol.limits import DISPUTES_PER_ESCROW_MAX

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


def current(context: Context, connection: Connection, agreement_hash: str, *, now: int) -> Escrow:
    """The escrow of an agreement, ended first when its settle window has passed.

    Raises LumarisError `not_found`.
    """
    escrow = store.find(connection, agreement_hash)
    if escrow is None:
        raise LumarisError("not_found", "No money is held for this agreement.")
    return end_if_due(context, connection, escrow, now=now)


def end_if_due(context: Context, connection: Connection, escrow: Escrow, *, now: int) -> Escrow:
    """The deadline decides, not the moment at which a chore gets to it: what the buyer vouchered
    as far as it was shown is paid, the rest returns."""
    if escrow.state not in ("held", "claimed") or now <= escrow.settle_by:
        return escrow
    contract = paying.contract_of(context, escrow)
    change = Change(paid=max(escrow.paid, escrow.voucher_total))
    after = store.advance(connection, escrow, "window_ended", evidence="", now=now, change=change)
    paying.finish(context, connection, escrow, after, contract, outcome="expired", now=now)
    paying.tell(connection, after, "window_ended", now=now)
    return after


def freeze(
    context: Context, connection: Connection, agreement_hash: str, *, evidence: str, now: int
) -> Escrow:
    """A dispute was opened: the vouchered part is paid, the rest is frozen until it has ended.

    `evidence` is the hash of the document that opened it. Each freeze is ended by one `award`.
    Raises ViolationError `already_settled` when nothing is held any more (see `current`), and
    LumarisError `not_found` or `too_many_holds`.
    """
    escrow = current(context, connection, agreement_hash, now=now)
    if store.disputes_ever(connection, agreement_hash) >= DISPUTES_PER_ESCROW_MAX:
        raise LumarisError(
            "too_many_holds", f"{DISPUTES_PER_ESCROW_MAX} disputes were opened on this escrow."
        )
    first = escrow.state != "disputed"
    paid = max(escrow.paid, escrow.voucher_total) if first else escrow.paid
    change = Change(paid=paid, disputes=escrow.disputes + 1)
    after = store.advance(
        connection, escrow, "dispute_opened", evidence=evidence, now=now, change=change
    )
    if first:
        contract = paying.contract_of(context, escrow)
        paying.pay_up(connection, escrow, after, contract, kind="vouchered", now=now)
    paying.tell(connection, after, "dispute_opened", now=now)
    return after


def give_back(
    context: Context, connection: Connection, agreement_hash: str, *, keep: int, now: int
) -> Escrow:
    """After the settle window: of what is frozen only `keep` stays, the rest returns to the buyer.

    Until then the seller may still show vouchers for all of it. Does nothing before, or where no
    more than that is held.
    """
    escrow = current(context, connection, agreement_hash, now=now)
    if escrow.state != "disputed" or now <= escrow.settle_by or escrow.remainder <= keep:
        return escrow
    excess = escrow.remainder - keep
    change = Change(returned=escrow.returned + excess)
    after = store.advance(connection, escrow, "window_ended", evidence="", now=now, change=change)
    legs = [Leg(escrow.account, wallet(escrow.buyer_owner, escrow.currency), excess)]
    move(connection, kind="returned", ref=escrow.session, legs=legs, now=now)
    paying.tell(connection, after, "window_ended", now=now)
    return after


def award(
    context: Context,
    connection: Connection,
    agreement_hash: str,
    *,
    award_nanos: int,
    ruling: bytes | None,
    now: int,
) -> Escrow:
    """One dispute has ended: pay its award (before the fee) to the seller from what is frozen.

    `ruling` is the signed ruling, None when the dispute was withdrawn and nothing is awarded.
    After the last one the escrow is `settled` if the seller has claimed meanwhile, else `claimed`.
    Raises LumarisError `no_funds` for an award above the remainder.
    """
    escrow = current(context, connection, agreement_hash, now=now)
    if award_nanos < 0 or (ruling is None and award_nanos):
        raise ValueError("only a ruling awards something, and never less than nothing")
    if award_nanos > escrow.remainder:
        raise LumarisError("no_funds", f"{escrow.remainder} nanos are frozen.")
    fact = "dispute_withdrawn" if ruling is None else "ruled"
    if escrow.disputes > 1:
        fact = "withdrawn_in_part" if ruling is None else "ruled_in_part"
    evidence = digest(ruling) if ruling is not None else ""
    change = Change(paid=escrow.paid + award_nanos, disputes=escrow.disputes - 1)
    after = store.advance(connection, escrow, fact, evidence=evidence, now=now, change=change)
    contract = paying.contract_of(context, escrow)
    if ruling is not None:
        store.add_ruling(connection, agreement_hash, ruling, award=award_nanos)
    paying.pay_up(connection, escrow, after, contract, kind="award", now=now)
    paying.tell(connection, after, fact, now=now)
    if after.disputes or after.claimed_total is None:
        return after
    change = Change(paid=max(after.paid, after.voucher_total))
    last = store.advance(
        connection, after, "seller_claim", evidence=evidence, now=now, change=change
    )
    paying.finish(context, connection, after, last, contract, outcome="claimed", now=now)
    paying.tell(connection, last, "seller_claim", now=now)
    return last
