"""What every funding adapter must do, and a provider outside that does it and fails on request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from lumaris_coordinator.money.port import (
    DepositEvent,
    FundingAdapter,
    PayoutOrder,
    PayoutStatus,
)

PAGE = 2


@dataclass
class Provider:
    """A payment provider with books of its own, which outlive the coordinator.

    `away` makes it unreachable, `slow` leaves payouts pending, `refuses` declines them.
    """

    name: str = "bank"
    currency: str = "TEST"
    total: int = 0
    events: list[DepositEvent] = field(default_factory=list)
    paid: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    pending: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    away: bool = False
    slow: bool = False
    refuses: bool = False

    def receive(
        self, account: str, amount: int, *, name: str = "", fact: str = "settled"
    ) -> DepositEvent:
        """Somebody pays in for a ledger account."""
        number = len(self.events) + 1
        event = DepositEvent(
            id=name or f"in-{number}",
            position=str(number),
            account=account,
            amount_nanos=amount,
            fact=fact,  # type: ignore[arg-type]
        )
        self.events.append(event)
        self.total += {"settled": amount, "seen": 0, "reversed": 0}[fact]
        return event

    async def deposits(self, after: str) -> Sequence[DepositEvent]:
        self._reach("deposits")
        start = int(after or 0)
        return self.events[start : start + PAGE]

    async def pay(self, order: PayoutOrder) -> PayoutStatus:
        self._reach("pay")
        known = order.id in self.paid or order.id in self.refused or order.id in self.pending
        if not known and self.refuses:
            self.refused.add(order.id)
        elif not known and self.slow:
            self.pending[order.id] = order.amount_nanos
        elif not known:
            self.paid[order.id] = order.amount_nanos
            self.total -= order.amount_nanos
        return self._status(order.id)

    async def status(self, payout: str) -> PayoutStatus:
        self._reach("status")
        return self._status(payout)

    async def provider_total(self) -> int:
        self._reach("total")
        return self.total

    def finish(self) -> None:
        """Pay what is pending."""
        for payout, amount in self.pending.items():
            self.paid[payout] = amount
            self.total -= amount
        self.pending.clear()

    def _status(self, payout: str) -> PayoutStatus:
        if payout in self.paid:
            return PayoutStatus(state="paid", reference=f"out-{payout}")
        if payout in self.refused:
            return PayoutStatus(state="refused", reason="the bank knows no such account")
        return PayoutStatus(state="pending" if payout in self.pending else "unknown")

    def _reach(self, call: str) -> None:
        self.calls.append(call)
        if self.away:
            raise ConnectionError("the provider is away")


async def check_adapter(
    adapter: FundingAdapter, pay_in: Callable[[int], Awaitable[None]], *, account: str, least: int
) -> None:
    """Hold an adapter to its port. `pay_in` makes a deposit of some nanos for `account`."""
    for amount in (5 * least, 6 * least, 7 * least):
        await pay_in(amount)
    assert await adapter.provider_total() == 18 * least
    await _check_deposits(adapter, account, [5 * least, 6 * least, 7 * least])
    await _check_payouts(adapter, account, least)


async def _check_deposits(adapter: FundingAdapter, account: str, amounts: list[int]) -> None:
    """Pages go on where the last one ended, repeat exactly, and end."""
    position = ""
    seen: list[DepositEvent] = []
    while page := await adapter.deposits(position):
        assert [event.position for event in await adapter.deposits(position)] == [
            event.position for event in page
        ]
        seen += page
        position = page[-1].position
        assert len(seen) <= len(amounts)
    assert [event.amount_nanos for event in seen] == amounts
    assert {event.account for event in seen} == {account}
    assert len({event.id for event in seen}) == len(amounts)


async def _check_payouts(adapter: FundingAdapter, account: str, least: int) -> None:
    """The same id is paid once, and its status is known to whoever asks later."""
    order = PayoutOrder(
        id="trf_" + "a" * 24, account=account, currency=adapter.currency, amount_nanos=4 * least
    )
    assert (await adapter.status(order.id)).state == "unknown"
    first = await adapter.pay(order)
    assert first.state == "paid"
    assert await adapter.pay(order) == first == await adapter.status(order.id)
    assert await adapter.provider_total() == 14 * least
