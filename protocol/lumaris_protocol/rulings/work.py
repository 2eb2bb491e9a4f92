"""What the shown work of a session is worth, by its own terms.

An order counts with the buyer's signed WorkOrder, for at most its price at the time it used:

- *delivered*: a Delivery with exit status 0, in time or accepted by the buyer;
- *kept*: it ended by the buyer's own Cancel, by a limit both agreed to, or by the guest itself:
  what was vouchered for it stays with the seller, but nothing beyond is owed;
- *rejected*: delivered, and refused by the buyer's signed word.

Anything else is worth nothing. An Acceptance says what the buyer owes for the session up to its
order, so one of them stands for all orders before it: a long session needs no long evidence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from msgspec.structs import replace as replace_field

from lumaris_protocol import pricing
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
from lumaris_protocol.messages.payment import Voucher
from lumaris_protocol.rulings.evidence import Session

_MS_PER_S: Final = 1000
_GUEST_ENDS: Final = frozenset(
    (
        "exit_nonzero",
        "killed_deadline",
        "killed_memory",
        "killed_inodes",
        "killed_pids",
        "killed_disk",
        "killed_output",
        "killed_log",
        "killed_fuel",
        "killed_trap",
        "budget_exceeded",
        "unpaid",
        "cancelled",
    )
)
_ENDED: Final = frozenset(("failed", "killed"))


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
    """The first WorkOrder shown of each number."""
    found: dict[int, WorkOrder] = {}
    for signed in session.documents:
        if isinstance(signed.message, WorkOrder):
            found.setdefault(signed.message.n, signed.message)
    return found


def worth(session: Session) -> Worth:
    """What all shown orders of a session are worth: one by one, or from the buyer's own word of
    what it owed, whichever says more."""
    parts = {n: _worth_of(session, order, n) for n, order in orders(session).items()}
    words = [
        signed.message
        for signed in session.documents
        if isinstance(signed.message, Acceptance) and signed.message.accepted
    ]
    sums = [_sum(parts.values())]
    if words:
        last = max(words, key=lambda word: (word.total_nanos, word.n))
        later = _sum(part for n, part in parts.items() if n > last.n)
        sums.append(replace(later, delivered=later.delivered + last.total_nanos))
    return max(sums, key=lambda found: found.total)


def voucher_top(session: Session) -> int:
    """The highest total that the buyer vouchered among the shown vouchers."""
    totals = [s.message.total_nanos for s in session.documents if isinstance(s.message, Voucher)]
    return max(totals, default=0)


def result_of(session: Session, n: int) -> Result | None:
    """How order `n` ended by the seller's own word: a Delivery, or the guest's failing status."""
    order = orders(session).get(n)
    delivery = _delivery(session, n)
    agreement = session.contract.agreement
    if order is None:
        return None
    if delivery is not None:
        price = min(delivery.amount_nanos, _price(agreement, order, delivery.usage))
        return Result(delivery.exit_status, delivery.output_root, delivery.stdout.sha256, price)
    event = _end(session, n)
    if event is None or not event.exit_status or event.reason != "exit_nonzero":
        return None
    return Result(event.exit_status, "", "", _price(agreement, order, event.usage))


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


def _worth_of(session: Session, order: WorkOrder, n: int) -> Worth:
    agreement = session.contract.agreement
    delivery, word = _delivery(session, n), _acceptance(session, n)
    if delivery is not None and delivery.exit_status == 0:
        amount = min(delivery.amount_nanos, _price(agreement, order, delivery.usage))
        if word is not None and not word.accepted:
            return Worth(rejected=amount)
        if word is not None or not _late(session, order, delivery):
            return Worth(delivered=amount)
        return Worth()
    event = _end(session, n)
    cancelled = any(isinstance(s.message, Cancel) and s.message.n == n for s in session.documents)
    if cancelled:
        whole = Usage(wall_ms=order.limits.wall_s * _MS_PER_S)
        return Worth(kept=_price(agreement, order, event.usage if event else whole))
    if event is not None and _by_agreed_limit(order, event):
        return Worth(kept=_price(agreement, order, event.usage))
    return Worth()


def _by_agreed_limit(order: WorkOrder, event: JobEvent) -> bool:
    """Whether the seller's word of the end agrees with the figures it signed beside it."""
    if event.reason == "killed_deadline":
        return event.usage.wall_ms >= order.limits.wall_s * _MS_PER_S
    if event.reason == "killed_fuel":
        return event.usage.fuel >= order.limits.fuel > 0
    if event.reason == "cancelled":
        return False  # the buyer's own Cancel says so, or nobody
    return event.reason in _GUEST_ENDS


def _price(agreement: Agreement, order: WorkOrder, usage: Usage) -> int:
    wall_ms = min(usage.wall_ms, _wall_ms_max(order))
    price = pricing.order_nanos(agreement.terms, wall_ms)
    return min(price, order.limits.cost_nanos) if order.limits.cost_nanos else price


def _wall_ms_max(order: WorkOrder) -> int:
    return order.limits.wall_s * _MS_PER_S * LATE_BPS // FEE_BPS_MAX


def _late(session: Session, order: WorkOrder, delivery: Delivery) -> bool:
    """Whether the seller's own documents say that it ran over its limit or past the agreement."""
    if delivery.usage.wall_ms > _wall_ms_max(order):
        return True
    ends_at = session.contract.agreement.ends_at + CLOCK_SKEW_S
    return any(
        isinstance(s.message, JobEvent)
        and s.message.n == delivery.n
        and s.message.seq < delivery.seq
        and s.message.at > ends_at
        for s in session.documents
    )


def _delivery(session: Session, n: int) -> Delivery | None:
    for signed in session.documents:
        if isinstance(signed.message, Delivery) and signed.message.n == n:
            return signed.message
    return None


def _acceptance(session: Session, n: int) -> Acceptance | None:
    """The buyer's word on an order; of two it is held to the one against itself."""
    words = [
        signed.message
        for signed in session.documents
        if isinstance(signed.message, Acceptance) and signed.message.n == n
    ]
    return max(words, key=lambda word: word.accepted, default=None)


def _end(session: Session, n: int) -> JobEvent | None:
    for signed in session.documents:
        message = signed.message
        if isinstance(message, JobEvent) and message.n == n and message.state in _ENDED:
            return message
    return None
