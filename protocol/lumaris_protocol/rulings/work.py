"""What the shown work of a session is worth, by its own terms.

An order counts with the buyer's signed WorkOrder, for at most its price at the time it used. What
the seller says of an order names that WorkOrder by its hash, and counts for no other one:

- *delivered*: a Delivery with exit status 0, in time or accepted by the buyer. What the buyer
  accepted counts without its papers as well, but then only for its start;
- *kept*: it ended by the buyer's own Cancel, by a limit both agreed to, by the guest itself, or
  with a session that the buyer left, did not pay or used to its end: what was vouchered for it
  stays with the seller, but nothing beyond is owed;
- *rejected*: delivered, and refused by the buyer's signed word.

Anything else is worth nothing, and so is an order of which the seller says two ends. An Acceptance
says what the buyer owes for the session up to its order, so one of them stands for all orders
before it: a long session needs no long evidence. The Close with which the buyer itself ends the
session says so of all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

from msgspec.structs import replace as replace_field

from lumaris_protocol import ends, pricing
from lumaris_protocol.limits import CLOCK_SKEW_S, FEE_BPS_MAX, LATE_BPS
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    JobEvent,
    Usage,
    WorkOrder,
)
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import BUYER_CLOSES, Close, Voucher
from lumaris_protocol.rulings.evidence import Session

_MS_PER_S: Final = 1000


@dataclass(frozen=True)
class Worth:
    """Nanos, by how the orders ended."""

    delivered: int = 0
    rejected: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.delivered + self.rejected + self.kept


@dataclass(frozen=True)
class Result:
    """What an order came to: what a second run of it must come to as well."""

    exit_status: int
    output_root: str
    stdout: str
    price_nanos: int


def orders(session: Session) -> dict[int, WorkOrder]:
    """The WorkOrder of each number: the one that the seller says came to an end, else the first."""
    return {n: order.message for n, order in _ordered(session).items()}


def ordered_twice(session: Session) -> bool:
    """Whether the buyer signed two orders under one number."""
    names: dict[int, str] = {}
    return any(
        names.setdefault(signed.message.n, signed.hash) != signed.hash
        for signed in session.documents
        if isinstance(signed.message, WorkOrder)
    )


def worth(session: Session, *, ends_at: int | None = None, without: Collection[int] = ()) -> Worth:
    """What all shown orders of a session are worth: one by one, or from the buyer's own word of
    what it owed, whichever says more.

    `ends_at` is the agreement's end as amended. The orders `without` are left out.
    """
    parts = {n: part for n, part in _parts(session, ends_at).items() if n not in without}
    words = [
        signed.message
        for signed in session.documents
        if isinstance(signed.message, Acceptance) and signed.message.accepted
    ]
    sums = [_sum(parts.values())]
    if words:
        last = max(words, key=lambda word: (word.total_nanos, word.n))
        covered = {word.n for word in words if word.seq <= last.seq}
        later = _sum(part for n, part in parts.items() if n > last.n and n not in covered)
        left_out = [n for n in without if n <= last.n or n in covered]
        owed = max(0, last.total_nanos - _price_of(session, left_out))
        sums.append(replace(later, delivered=later.delivered + owed))
    return max(sums, key=lambda found: found.total)


def against_refund(
    session: Session, *, ends_at: int | None = None, without: Collection[int] = ()
) -> int:
    """What the seller may keep: the worth of the shown work, or the total with which the buyer
    itself closed the session. Parameters as of `worth`."""
    kept = worth(session, ends_at=ends_at, without=without).total
    totals = [
        signed.message.total_nanos
        for signed in session.by(session.contract.agreement.buyer_session_key)
        if isinstance(signed.message, Close) and signed.message.reason == BUYER_CLOSES
    ]
    return max(kept, max(totals, default=0) - _price_of(session, without))


def voucher_top(session: Session) -> int:
    """The highest total that the buyer vouchered among the shown vouchers."""
    totals = [s.message.total_nanos for s in session.documents if isinstance(s.message, Voucher)]
    return max(totals, default=0)


def result_of(session: Session, n: int) -> Result | None:
    """How order `n` ended by the seller's own word: a Delivery, or the guest's failing status."""
    ordered = _ordered(session).get(n)
    if ordered is None:
        return None
    agreement, order = session.contract.agreement, ordered.message
    delivery = _delivery(session, n, ordered.hash)
    if delivery is not None:
        price = min(delivery.amount_nanos, _price(agreement, order, delivery.usage))
        return Result(delivery.exit_status, delivery.output_root, delivery.stdout.sha256, price)
    event = _end(session, n, ordered.hash)
    if event is None or event.state == "error" or event.reason != "exit_nonzero":
        return None
    if not event.exit_status:
        return None
    return Result(event.exit_status, "", "", _price(agreement, order, event.usage))


def ended_twice(session: Session, n: int) -> bool:
    """Whether the seller says two ends of order `n`: at most one of them is true."""
    ordered = _ordered(session).get(n)
    return ordered is not None and len(_ends(session, n, ordered.hash)) > 1


def same_order(first: WorkOrder, second: WorkOrder) -> bool:
    """Whether two orders ask for the same computation: everything but number and payment.

    The limits are part of it: with less memory a guest may end in another way.
    """
    return (
        first.image == second.image
        and first.command == second.command
        and first.environment == second.environment
        and first.input_root == second.input_root
        and replace_field(first.limits, cost_nanos=0) == replace_field(second.limits, cost_nanos=0)
        and not (first.stdin or second.stdin)
    )


def _sum(parts: Iterable[Worth]) -> Worth:
    parts = tuple(parts)
    return Worth(
        sum(part.delivered for part in parts),
        sum(part.rejected for part in parts),
        sum(part.kept for part in parts),
    )


@dataclass(frozen=True)
class _Ordered:
    message: WorkOrder
    hash: str


def _ordered(session: Session) -> dict[int, _Ordered]:
    """The order of each number that counts, by name."""
    ended = {
        signed.message.order_hash
        for signed in session.documents
        if isinstance(signed.message, JobEvent | Delivery) and ends.is_end(signed.message)
    }
    found: dict[int, _Ordered] = {}
    for signed in session.documents:
        if isinstance(signed.message, WorkOrder):
            order = _Ordered(signed.message, signed.hash)
            known = found.setdefault(order.message.n, order)
            if known.hash not in ended and order.hash in ended:
                found[order.message.n] = order
    return found


def _price_of(session: Session, numbers: Iterable[int]) -> int:
    """What these orders may have added to the buyer's totals: in part one is paid while it runs."""
    results = (result_of(session, n) for n in numbers)
    return sum(result.price_nanos for result in results if result is not None)


def _parts(session: Session, ends_at: int | None) -> dict[int, Worth]:
    """What each order is worth, of those that were shown or accepted."""
    ordered = _ordered(session)
    accepted = {
        signed.message.n
        for signed in session.documents
        if isinstance(signed.message, Acceptance) and signed.message.accepted
    }
    until = session.contract.agreement.ends_at if ends_at is None else ends_at
    parts = {n: _worth_of(session, order, until) for n, order in ordered.items()}
    start = Worth(delivered=pricing.order_nanos(session.contract.agreement.terms, 0))
    for n in accepted:
        parts[n] = max(parts.get(n, start), start, key=lambda part: part.total)
    return parts


def _worth_of(session: Session, ordered: _Ordered, ends_at: int) -> Worth:
    agreement, order, n = session.contract.agreement, ordered.message, ordered.message.n
    delivery, word = _delivery(session, n, ordered.hash), _acceptance(session, n)
    if len(_ends(session, n, ordered.hash)) > 1:
        return Worth()
    if delivery is not None and delivery.exit_status == 0:
        amount = min(delivery.amount_nanos, _price(agreement, order, delivery.usage))
        if word is not None and not word.accepted:
            return Worth(rejected=amount)
        if word is not None or not _late(session, order, delivery, ends_at):
            return Worth(delivered=amount)
        return Worth()
    event = _end(session, n, ordered.hash)
    if event is not None and event.state == "error":
        return Worth()
    cancelled = any(isinstance(s.message, Cancel) and s.message.n == n for s in session.documents)
    if cancelled:
        whole = Usage(wall_ms=order.limits.wall_s * _MS_PER_S)
        return Worth(kept=_price(agreement, order, event.usage if event else whole))
    return Worth(kept=_kept(session, order, event) if event is not None else 0)


def _kept(session: Session, order: WorkOrder, event: JobEvent) -> int:
    """What the seller may keep of an order that ended like this, by the figures beside it."""
    agreement, usage = session.contract.agreement, event.usage
    price = _price(agreement, order, usage)
    if event.reason in ends.BY_SESSION:
        if not usage.wall_ms or (event.reason == "lease_ended" and event.at < agreement.ends_at):
            return 0
        # A session ends unpaid only when this much of its order was not paid.
        unpaid = agreement.terms.exposure_nanos if event.reason == "unpaid" else 0
        return max(0, price - unpaid)
    kept = ends.is_kept(
        agreement.terms, order.limits, event.reason, usage, vouchered_nanos=voucher_top(session)
    )
    return price if kept else 0


def _price(agreement: Agreement, order: WorkOrder, usage: Usage) -> int:
    wall_ms = min(usage.wall_ms, _wall_ms_max(order))
    price = pricing.order_nanos(agreement.terms, wall_ms)
    return min(price, order.limits.cost_nanos) if order.limits.cost_nanos else price


def _wall_ms_max(order: WorkOrder) -> int:
    return order.limits.wall_s * _MS_PER_S * LATE_BPS // FEE_BPS_MAX


def _late(session: Session, order: WorkOrder, delivery: Delivery, ends_at: int) -> bool:
    """Whether the seller's own documents say that it ran over its limit or past the agreement."""
    if delivery.usage.wall_ms > _wall_ms_max(order):
        return True
    return any(
        isinstance(s.message, JobEvent)
        and s.message.order_hash == delivery.order_hash
        and s.message.seq < delivery.seq
        and s.message.at > ends_at + CLOCK_SKEW_S
        for s in session.documents
    )


def _delivery(session: Session, n: int, name: str) -> Delivery | None:
    for signed in session.documents:
        message = signed.message
        if isinstance(message, Delivery) and message.n == n and message.order_hash == name:
            return message
    return None


def _acceptance(session: Session, n: int) -> Acceptance | None:
    """The buyer's word on an order; of two it is held to the one against itself."""
    words = [
        signed.message
        for signed in session.documents
        if isinstance(signed.message, Acceptance) and signed.message.n == n
    ]
    return max(words, key=lambda word: word.accepted, default=None)


def _ends(session: Session, n: int, name: str) -> dict[str, JobEvent | Delivery]:
    """The seller's last words on an order, by their hashes; an honest one signs one."""
    return {
        signed.hash: signed.message
        for signed in session.documents
        if isinstance(signed.message, JobEvent | Delivery)
        and ends.is_end(signed.message)
        and (signed.message.n, signed.message.order_hash) == (n, name)
    }


def _end(session: Session, n: int, name: str) -> JobEvent | None:
    found = _ends(session, n, name).values()
    return next((end for end in found if isinstance(end, JobEvent)), None)
