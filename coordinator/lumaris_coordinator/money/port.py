"""What the coordinator asks of whoever holds the money outside: one port for every provider.

A provider has books of its own and may answer late, twice or not at all. So a deposit is credited
once by the provider's name of it, a payout is sent under our id until the provider says what became
of it, and both books are compared every day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from lumaris_protocol.machines.table import Row, Table

DEPOSIT: Final = Table(
    "deposit",
    initial="seen",
    final=("credited", "void"),
    rows=(
        Row("seen", "settled", "credited", "credit the account"),
        Row("seen", "reversed", "void", "nothing: it was not credited yet"),
        Row("credited", "settled", "credited", "nothing: it was credited before"),
        Row("void", "reversed", "void", "nothing: it was reversed before"),
    ),
)
PAYOUT: Final = Table(
    "payout",
    initial="requested",
    final=("paid", "returned"),
    rows=(
        Row("requested", "held", "held", "move the amount from the wallet to the payout's account"),
        Row("held", "sent", "sent", "record that the provider is about to be asked"),
        Row("sent", "paid", "paid", "move the amount out to the provider"),
        Row("sent", "refused", "failed", "the provider has not paid and will not"),
        Row("failed", "returned", "returned", "move the amount back to the wallet"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class DepositEvent:
    """News of a deposit. `id` is the provider's name of it, `position` where to go on after it.

    `account` is the ledger account it is for. `txn` is the number of the transaction that has
    credited it already, which only a provider inside this program can know.
    """

    id: str
    position: str
    account: str
    amount_nanos: int
    fact: Literal["seen", "settled", "reversed"]
    txn: int | None = None


@dataclass(frozen=True, kw_only=True)
class PayoutOrder:
    """What a provider is told to pay: `id` names the payout for ever."""

    id: str
    account: str
    currency: str
    amount_nanos: int


@dataclass(frozen=True, kw_only=True)
class PayoutStatus:
    """What the provider says of a payout. `unknown`: it was never asked to pay it."""

    state: Literal["unknown", "pending", "paid", "refused"]
    reference: str = ""
    reason: str = ""


class FundingAdapter(Protocol):
    """One provider in one currency. Every method may raise anything when the provider is away.

    The ledger's side of it is the account `external:<name>:<currency>`: minus what it holds.
    """

    @property
    def name(self) -> str:
        """Its name in accounts and requests."""
        ...

    @property
    def currency(self) -> str:
        """The currency it takes and pays."""
        ...

    async def deposits(self, after: str) -> Sequence[DepositEvent]:
        """A page of events behind a position, oldest first; `""` is the beginning."""
        ...

    async def pay(self, order: PayoutOrder) -> PayoutStatus:
        """Pay, or say what became of it: the same id is paid once, however often it is asked."""
        ...

    async def status(self, payout: str) -> PayoutStatus:
        """What became of a payout."""
        ...

    async def provider_total(self) -> int:
        """Nanos of ours that the provider holds, by its own books."""
        ...
