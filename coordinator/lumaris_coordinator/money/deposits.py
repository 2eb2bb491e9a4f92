"""Deposits: what the providers have received is credited, each event once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lumaris_coordinator.bounds import DEPOSIT_PAGES_PER_ROUND_MAX
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.ledger.store import Leg, move, open_account
from lumaris_coordinator.money.port import DEPOSIT, DepositEvent, FundingAdapter
from lumaris_coordinator.money.provider import asked
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.errors import InvalidTransition
from lumaris_protocol.machines.table import Machine

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)


class Deposits:
    """Follows the events of every adapter."""

    def __init__(
        self, context: Context, adapters: Mapping[tuple[str, str], FundingAdapter]
    ) -> None:
        self._context, self._adapters = context, adapters

    async def round(self) -> int:
        """Take what is new, page by page up to a bound; how many events were taken."""
        count = 0
        for adapter in self._adapters.values():
            try:
                count += await self._follow(adapter)
            except Exception:
                log.exception("the deposits of %s could not be followed", adapter.name)
        return count

    async def pending(self, adapter: FundingAdapter) -> int:
        """Nanos that the provider has settled and the ledger has not credited yet: one page."""
        page = await asked(adapter.deposits(await self._position(adapter)))
        return sum(
            event.amount_nanos for event in page if event.fact == "settled" and event.txn is None
        )

    async def _follow(self, adapter: FundingAdapter) -> int:
        count = 0
        for _ in range(DEPOSIT_PAGES_PER_ROUND_MAX):
            page = await asked(adapter.deposits(await self._position(adapter)))
            if not page:
                break
            await self._context.store.submit(
                partial(_take_page, adapter=adapter, page=page, now=self._context.now())
            )
            count += len(page)
        return count

    async def _position(self, adapter: FundingAdapter) -> str:
        row = await self._context.store.read(
            lambda connection: first(
                connection,
                "SELECT position FROM deposit_cursor WHERE adapter = ? AND currency = ?",
                (adapter.name, adapter.currency),
            )
        )
        return str(row[0]) if row else ""


def save_position(connection: Connection, adapter: FundingAdapter, position: str) -> None:
    """The next page begins behind this position."""
    connection.execute(
        "INSERT INTO deposit_cursor (adapter, currency, position) VALUES (?, ?, ?)"
        " ON CONFLICT (adapter, currency) DO UPDATE SET position = excluded.position",
        (adapter.name, adapter.currency, position),
    )


def _take_page(
    connection: Connection, *, adapter: FundingAdapter, page: Sequence[DepositEvent], now: int
) -> None:
    for event in page:
        _take_or_tell(connection, adapter, event, now)
    save_position(connection, adapter, page[-1].position)


def _take_or_tell(
    connection: Connection, adapter: FundingAdapter, event: DepositEvent, now: int
) -> None:
    """One event that makes no sense must not keep those behind it from being credited."""
    try:
        take(connection, adapter, event, now=now)
    except InvalidTransition as error:
        log.error("deposit %s at %s: %s", event.id, adapter.name, error)


def take(connection: Connection, adapter: FundingAdapter, event: DepositEvent, *, now: int) -> None:
    """Apply one event. Repeating it changes nothing, in whatever order the events come.

    Raises InvalidTransition for an event that contradicts what was done, such as the reversal of
    a deposit that was credited: the books differ then, and a person must look.
    """
    key = (adapter.name, adapter.currency, event.id)
    if first(connection, "SELECT 1 FROM account WHERE id = ?", (event.account,)) is None:
        log.error("deposit %s at %s names no account here", event.id, adapter.name)
        return
    row = first(
        connection,
        "SELECT state FROM deposit WHERE adapter = ? AND currency = ? AND event = ?",
        key,
    )
    before = str(row[0]) if row else DEPOSIT.initial
    if row is None:
        connection.execute(
            "INSERT INTO deposit (adapter, currency, event, account, amount, state, seen_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*key, event.account, event.amount_nanos, DEPOSIT.initial, now),
        )
    if event.fact == "seen":
        return
    machine = Machine(DEPOSIT, before)
    machine.take(event.fact)  # before any money moves: a refused event leaves nothing behind
    if machine.state == before:
        return
    txn = _credit(connection, adapter, event, now) if machine.state == "credited" else None
    # What was seen at first may have been another amount: the row tells what came of it.
    connection.execute(
        "UPDATE deposit SET account = ?, amount = ?, state = ?, txn = ?"
        " WHERE adapter = ? AND currency = ? AND event = ?",
        (event.account, event.amount_nanos, machine.state, txn, *key),
    )


def _credit(connection: Connection, adapter: FundingAdapter, event: DepositEvent, now: int) -> int:
    if event.txn is not None:
        return event.txn
    currency = adapter.currency
    source = open_account(
        connection,
        owner=f"external:{adapter.name}",
        kind="external",
        currency=currency,
        may_negative=True,
    )
    legs = [Leg(source, event.account, event.amount_nanos)]
    txn = move(connection, kind="deposit", ref=event.id, legs=legs, now=now)
    parties = parties_of(connection, event.account)
    body = {"adapter": adapter.name, "amount_nanos": event.amount_nanos, "currency": currency}
    emit(connection, "account.credited", ref=event.id, parties=parties, body=body, now=now)
    return txn


def parties_of(connection: Connection, account: str) -> list[str]:
    """Whom an event about a wallet concerns: its peer, or its user."""
    owner = account.rpartition(":")[0]
    row = first(connection, "SELECT peer FROM peer WHERE account = ?", (owner,))
    return [str(row[0]) if row else owner]
