"""What the buyer's own words say that it owes, and what a seller would have to show beside them.

A buyer may deny later that its orders were delivered, and a side of a dispute shows only so many
documents. One accepted total stands for all orders before it; so the seller takes none that says
less than it should, and works no further when too much that was paid stands on no word at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumaris_protocol.errors import ViolationError
from lumaris_protocol.limits import EVIDENCE_BYTES_MAX, EVIDENCE_DOCUMENTS_MAX

# An order, what the seller said of it, and the buyer's Cancel or refusal: at most three documents
# each, so that a quarter of what a side may show is left; and half of its bytes.
_ORDERS_MAX = EVIDENCE_DOCUMENTS_MAX // 4
_BYTES_MAX = EVIDENCE_BYTES_MAX // 4


@dataclass(frozen=True)
class Kept:
    """Paid orders that the buyer did not accept, since the session began."""

    nanos: int = 0
    orders: int = 0
    size_bytes: int = 0


class Words:
    """The buyer's words of one session."""

    def __init__(self) -> None:
        self.kept = Kept()
        self._accepted_nanos = 0
        self._spoken = Kept()

    def keep(self, nanos: int, *, size_bytes: int) -> None:
        """An order ended without being accepted, with this much paid for it."""
        if nanos:
            before = self.kept
            self.kept = Kept(
                before.nanos + nanos, before.orders + 1, before.size_bytes + size_bytes
            )

    def accept(self, amount_nanos: int, total_nanos: int, *, kept: Kept) -> None:
        """The buyer accepts a delivery for this amount, and says what it owes for ended orders.

        `kept` is what was kept when the seller signed that delivery: the buyer knew it by then.
        Raises ViolationError `understated`.
        """
        self._accepted_nanos += amount_nanos
        if total_nanos < self._accepted_nanos + kept.nanos:
            raise ViolationError("understated")
        if kept.orders > self._spoken.orders:
            self._spoken = kept

    def is_full(self, unanswered: Kept) -> bool:
        """Whether work should wait for an answer: another paid order without one may be too many
        to show. `unanswered` are those delivered."""
        return unanswered.orders > 0 and (
            self.kept.orders - self._spoken.orders + unanswered.orders >= _ORDERS_MAX
            or self.kept.size_bytes - self._spoken.size_bytes + unanswered.size_bytes >= _BYTES_MAX
        )

    @property
    def too_few(self) -> bool:
        """Whether more was paid without a word of the buyer than could be shown."""
        return (
            self.kept.orders - self._spoken.orders > _ORDERS_MAX
            or self.kept.size_bytes - self._spoken.size_bytes > _BYTES_MAX
        )
