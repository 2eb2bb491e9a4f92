"""Every day the books of each provider are compared with the ledger's account of it.

They must agree to the nano, after what is under way between them. When they do not, somebody owes
money that nobody wrote down: payouts of that adapter stop until a later comparison agrees, and
nothing else does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from lumaris_coordinator.bounds import (
    PAYOUTS_PER_ROUND_MAX,
    RECONCILE_ATTEMPTS_MAX,
    RECONCILE_RETRY_S,
)
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.money import store
from lumaris_coordinator.money.deposits import Deposits
from lumaris_coordinator.money.port import FundingAdapter
from lumaris_coordinator.money.provider import asked
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol.limits import SEQ_MAX

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

DAY_S: Final = 86_400


@dataclass(frozen=True)
class _Books:
    """What the ledger says at one moment: what the provider holds, and payouts under way."""

    held_nanos: int
    sent: tuple[tuple[str, int], ...]


class Reconciliation:
    """Compares, stores what it found, and tells."""

    def __init__(
        self,
        context: Context,
        adapters: Mapping[tuple[str, str], FundingAdapter],
        deposits: Deposits,
        *,
        steady: anyio.Lock,
    ) -> None:
        self._context, self._adapters, self._deposits = context, adapters, deposits
        self._steady = steady
        # The newest comparison of each adapter, for the metrics.
        self.newest: dict[tuple[str, str], dict[str, Any]] = {}

    async def round(self) -> None:
        """Compare every adapter whose comparison of today is missing, or found a difference."""
        for key, adapter in self._adapters.items():
            try:
                await self._if_due(key, adapter)
            except Exception:
                log.exception("the books of %s could not be compared", adapter.name)

    async def _if_due(self, key: tuple[str, str], adapter: FundingAdapter) -> None:
        now = self._context.now()
        found = await self._context.store.read(
            lambda connection: store.newest_comparison(connection, *key)
        )
        if found is not None:
            self.newest[key] = found
            again = found["difference_nanos"] != 0 and now >= found["at"] + RECONCILE_RETRY_S
            if found["day"] == now // DAY_S and not again:
                return
        await self.compare(adapter)

    async def compare(self, adapter: FundingAdapter) -> dict[str, Any] | None:
        """Compare one adapter now; the row that was stored, or None when the ledger moved all the
        while, so that the next round must try again."""
        async with self._steady:
            for _ in range(RECONCILE_ATTEMPTS_MAX):
                await self._deposits.round()
                before = await self._books(adapter)
                pending = await self._pending(adapter, before)
                total = await asked(adapter.provider_total())
                after = await self._books(adapter)
                if before == after or total - pending == before.held_nanos:
                    return await self._store(adapter, total, before.held_nanos, pending)
        log.warning("the books of %s did not stand still to be compared", adapter.name)
        return None

    async def _books(self, adapter: FundingAdapter) -> _Books:
        def look(connection: Connection) -> _Books:
            outside = wallet(f"external:{adapter.name}", adapter.currency)
            under_way = store.sent(
                connection,
                adapter=adapter.name,
                currency=adapter.currency,
                limit=PAYOUTS_PER_ROUND_MAX,
            )
            sent = tuple((payout.id, payout.amount) for payout in under_way)
            return _Books(-balance(connection, outside), sent)

        return await self._context.store.read(look)

    async def _pending(self, adapter: FundingAdapter, books: _Books) -> int:
        """What the provider has done that the ledger has not booked yet: deposits minus payouts."""
        pending = await self._deposits.pending(adapter)
        for payout, amount in books.sent:
            status = await asked(adapter.status(payout))
            if status.state == "paid":
                pending -= amount
        return pending

    async def _store(
        self, adapter: FundingAdapter, total: int, ledger: int, pending: int
    ) -> dict[str, Any]:
        now = self._context.now()
        key = (adapter.name, adapter.currency)
        difference = total - ledger - pending

        def operation(connection: Connection) -> dict[str, Any]:
            connection.execute(
                "INSERT INTO reconciliation (id, adapter, currency, day, provider_nanos,"
                " ledger_nanos, pending_nanos, difference_nanos, at) VALUES"
                " ((SELECT coalesce(max(id), 0) + 1 FROM reconciliation), ?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, now // DAY_S, total, ledger, pending, difference, now),
            )
            found = store.newest_comparison(connection, *key)
            assert found is not None
            return found

        found = self.newest[key] = await self._context.store.submit(operation)
        if difference:
            log.error(
                "%s holds %d nanos of %s and the ledger says %d (%d under way): payouts are frozen",
                adapter.name,
                total,
                adapter.currency,
                ledger,
                pending,
            )
        return found

    async def listed(self, *, before: int | None, limit: int) -> dict[str, Any]:
        """A page of comparisons, newest first; `next` continues behind it, null at the end."""
        start = SEQ_MAX if before is None else before
        found = await self._context.store.read(
            lambda connection: store.comparisons(connection, before=start, limit=limit + 1)
        )
        page = found[:limit]
        return {"reconciliations": page, "next": page[-1]["id"] if len(found) > limit else None}

    def gauges(self) -> list[tuple[str, str, float]]:
        """(name, kind, value): adapters whose books differ, and the oldest comparison's age."""
        now, found = self._context.now(), self.newest.values()
        differing = sum(1 for row in found if row["difference_nanos"])
        oldest = max((now - row["at"] for row in found), default=0)
        return [
            ("reconciliation_differences", "gauge", differing),
            ("reconciliation_age_seconds", "gauge", max(0, oldest)),
        ]


def check(connection: Connection) -> Iterator[str]:
    """A line for each adapter whose books differed when they were last compared."""
    for adapter, currency in all_rows(
        connection, "SELECT DISTINCT adapter, currency FROM reconciliation ORDER BY 1, 2"
    ):
        found = store.newest_comparison(connection, adapter, currency)
        assert found is not None
        if found["difference_nanos"]:
            difference = found["difference_nanos"]
            yield f"{adapter} ({currency}) differs from the ledger by {difference} nanos"
