"""What disputes do to an escrow. Runs inside an operation of the writer.

While a dispute is open the vouchered part belongs to the seller and is paid at once; only the rest
is frozen. A ruling gives the seller an award from it. When the last dispute has ended, an escrow
whose seller has claimed meanwhile is settled in the same step. Otherwise it is `claimed` again: a
seller that was not heard may show its vouchers until the settle window ends, so that no dispute,
whoever opened it and however soon it ended, takes vouchered money from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lumaris_coordinator.escrow import paying, store
from lumaris_coordinator.escrow.store import Escrow
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
    after = store.advance(connection, escrow, "window_ended", evidence="", now=now)
    after = paying.finish(
        context, connection, after, contract, total=after.voucher_total, outcome="expired", now=now
    )
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
    after = store.advance(connection, escrow, "dispute_opened", evidence=evidence, now=now)
    if escrow.state != "disputed":
        contract = paying.contract_of(context, escrow)
        after = paying.pay_up(
            connection, after, contract, after.voucher_total, kind="vouchered", now=now
        )
    after = replace(after, disputes=after.disputes + 1)
    store.save_settlement(connection, after)
    paying.tell(connection, after, "dispute_opened", now=now)
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
    after = store.advance(connection, escrow, fact, evidence=evidence, now=now)
    contract = paying.contract_of(context, escrow)
    if ruling is not None:
        store.add_ruling(connection, agreement_hash, ruling, award=award_nanos)
    after = paying.pay_up(
        connection, after, contract, after.paid + award_nanos, kind="award", now=now
    )
    after = replace(after, disputes=after.disputes - 1)
    store.save_settlement(connection, after)
    paying.tell(connection, after, fact, now=now)
    if after.disputes or after.claimed_total is None:
        return after
    after = store.advance(connection, after, "seller_claim", evidence=evidence, now=now)
    after = paying.finish(
        context, connection, after, contract, total=after.voucher_total, outcome="claimed", now=now
    )
    paying.tell(connection, after, "seller_claim", now=now)
    return after
