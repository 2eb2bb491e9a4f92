"""The money room, wired: adapters, deposits, payouts and the comparison of their books."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import anyio

from lumaris_coordinator.money.deposits import Deposits
from lumaris_coordinator.money.payouts import Payouts
from lumaris_coordinator.money.port import FundingAdapter
from lumaris_coordinator.money.reconciliation import Reconciliation

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


class Money:
    """Every adapter of a coordinator, by name and currency."""

    def __init__(self, context: Context, adapters: Iterable[FundingAdapter]) -> None:
        steady = anyio.Lock()
        self.adapters = {(adapter.name, adapter.currency): adapter for adapter in adapters}
        self.deposits = Deposits(context, self.adapters)
        self.payouts = Payouts(context, self.adapters, steady=steady)
        self.reconciliation = Reconciliation(context, self.adapters, self.deposits, steady=steady)

    async def run_chores(self) -> None:
        """One round: credit what came in, follow what goes out, compare the books once a day."""
        await self.deposits.round()
        self.payouts.wake()
        await self.reconciliation.round()
