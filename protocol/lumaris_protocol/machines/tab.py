"""The running tab of a session: what is owed, what is vouchered, what is still unpaid.

Both sides keep one and it follows the same rules, so they agree without exchanging it:

- only vouchers are money; a voucher's total never falls and never exceeds the cap;
- a rise of the total pays the orders on the tab first in, first out;
- an order that fails is struck off: what was vouchered for it stays paid, the rest is not owed;
- one that the seller's platform failed is struck off with all that was vouchered for it: that is
  credit for later orders, and what is left of it at the end is given back by the co-signed close.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumaris_protocol.errors import ViolationError
from lumaris_protocol.limits import NANOS_MAX


@dataclass
class _Line:
    amount_nanos: int = 0
    paid_nanos: int = 0
    final: bool = False


class Tab:
    """The tab of one session under a cap."""

    def __init__(self, *, cap_nanos: int, vouchered_nanos: int = 0) -> None:
        self.cap_nanos = cap_nanos
        self.vouchered_nanos = vouchered_nanos
        self._credit_nanos = 0  # vouchered beyond every line: paid ahead, or given back
        self._lines: dict[int, _Line] = {}

    @property
    def due_nanos(self) -> int:
        """The vouchered total less the credit, which pays for nothing yet."""
        return self.vouchered_nanos - self._credit_nanos

    @property
    def unpaid_nanos(self) -> int:
        """What the lines on the tab cost beyond what was vouchered for them."""
        return sum(line.amount_nanos - line.paid_nanos for line in self._lines.values())

    @property
    def delivered_unpaid_nanos(self) -> int:
        """The same for delivered and accepted orders only."""
        return sum(
            line.amount_nanos - line.paid_nanos for line in self._lines.values() if line.final
        )

    def amount_nanos(self, n: int) -> int:
        """What order `n` costs so far; nothing once it is paid and gone."""
        return self._lines[n].amount_nanos if n in self._lines else 0

    def paid_nanos(self, n: int) -> int:
        """What of that was vouchered; nothing once it is paid and gone."""
        return self._lines[n].paid_nanos if n in self._lines else 0

    def accrue(self, n: int, amount_nanos: int) -> None:
        """Order `n` has cost this much so far; a smaller figure than before changes nothing."""
        line = self._lines.setdefault(n, _Line())
        line.amount_nanos = max(line.amount_nanos, amount_nanos)
        self._pay()

    def finish(self, n: int, amount_nanos: int) -> None:
        """Order `n` was delivered and accepted for this amount."""
        line = self._lines.setdefault(n, _Line())
        line.amount_nanos, line.final = max(amount_nanos, line.paid_nanos), True
        self._pay()

    def strike(self, n: int, *, metered_nanos: int = NANOS_MAX) -> int:
        """Order `n` failed or was rejected: its unpaid part is not owed; what was paid for it.

        The seller says how much of it was metered: a voucher above that was meant for other lines,
        however it was spread here, and pays them. Nothing of it counts (`metered_nanos` 0) when the
        seller's platform failed the order.
        """
        line = self._lines.pop(n, None)
        if line is None:
            return 0
        paid = min(line.paid_nanos, metered_nanos)
        self._credit_nanos += line.paid_nanos - paid
        self._pay()
        return paid

    def give_back(self, total_nanos: int) -> None:
        """The seller ends it for this total: the rest comes off open orders, the newest first."""
        for line in reversed(self._lines.values()):
            if not line.final:
                part = min(line.paid_nanos, max(0, self.due_nanos - total_nanos))
                self._credit_nanos += part
                line.paid_nanos -= part
                line.amount_nanos = line.paid_nanos

    def voucher(self, total_nanos: int) -> int:
        """Take a voucher; by how much it raises the total.

        Raises ViolationError: `voucher_stale` when it does not rise, `over_cap` above the cap.
        """
        if total_nanos <= self.vouchered_nanos:
            raise ViolationError("voucher_stale")
        if total_nanos > self.cap_nanos:
            raise ViolationError("over_cap")
        raised = total_nanos - self.vouchered_nanos
        self.vouchered_nanos = total_nanos
        self._credit_nanos += raised
        self._pay()
        return raised

    def _pay(self) -> None:
        """Spread credit over the lines, oldest first, and drop what is final and paid."""
        for line in self._lines.values():
            part = min(line.amount_nanos - line.paid_nanos, self._credit_nanos)
            line.paid_nanos += part
            self._credit_nanos -= part
        settled = [
            n
            for n, line in self._lines.items()
            if line.final and line.paid_nanos == line.amount_nanos
        ]
        for n in settled:
            del self._lines[n]
