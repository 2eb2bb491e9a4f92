"""Which ends of an order leave with the seller what was vouchered while it ran.

Both tabs of a session and every ruling on it read the same table, so neither side keeps by its tab
what a dispute then takes from it. An end that is in no set here is the seller's own: credit.
"""

from __future__ import annotations

from typing import Final

from lumaris_protocol import pricing
from lumaris_protocol.messages.execution import Delivery, JobEvent, Limits, Usage
from lumaris_protocol.messages.negotiation import PriceTerms

_MS_PER_S: Final = 1000
_ENDED: Final = frozenset(("failed", "killed", "error"))
_BY_GUEST: Final = frozenset(
    (
        "exit_nonzero",
        "killed_memory",
        "killed_inodes",
        "killed_pids",
        "killed_disk",
        "killed_output",
        "killed_log",
        "killed_trap",
    )
)
# The buyer went, did not pay, or the lease was over: the session ends and its order with it.
BY_SESSION: Final = frozenset(("buyer_lost", "unpaid", "lease_ended"))
# The seller's own reasons to end a session. Every other one is a rule that the buyer broke.
BY_SELLER: Final = frozenset(
    ("shutting_down", "killed_owner", "idle", "platform_error", "invalid_transition")
)


def is_end(message: object) -> bool:
    """Whether a seller's message is its last word on an order: it may say only one."""
    ended = isinstance(message, JobEvent) and message.state in _ENDED
    return ended or isinstance(message, Delivery)


def is_kept(
    terms: PriceTerms, limits: Limits, reason: str, usage: Usage, *, vouchered_nanos: int
) -> bool:
    """Whether the guest ended by itself or at a limit to which both agreed.

    That a limit of time, fuel or cost was reached must stand in the figures; `vouchered_nanos` is
    the session's highest voucher, beside which an order can pass the cap.
    """
    if reason == "killed_deadline":
        return usage.wall_ms >= limits.wall_s * _MS_PER_S
    if reason == "killed_fuel":
        return usage.fuel >= limits.fuel > 0
    if reason == "budget_exceeded":
        price = pricing.order_nanos(terms, usage.wall_ms)
        return price > limits.cost_nanos > 0 or vouchered_nanos + price > terms.cap_nanos
    return reason in _BY_GUEST


def session_end(reason: str) -> str:
    """What an open order is told when its session ends for `reason`."""
    return reason if reason in BY_SESSION | BY_SELLER else "buyer_lost"
