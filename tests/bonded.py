"""Sellers with a bond and sellers that lie: what a dispute over a result needs."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from lumaris.coordinator import CoordinatorLink
from lumaris.disputes import DisputeDesk, open_desk
from lumaris.profile import Profile
from lumaris_node.executors.port import JobSpec
from lumaris_node.orders import OrderRun
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import DisputeDetail, Request
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.budget import BondRequest, CreditRequest
from tests.market import URL, Market, Seller

BOND = 50_000_000
_ROUNDS = 3


async def lock_bond(
    call: Callable[[Request[Any]], Awaitable[Any]],
    key: KeyPair,
    *,
    coordinator: str,
    network: str,
    amount: int = BOND,
) -> None:
    """Fund a peer's account and lock a bond from it, with as much left to open disputes with."""
    now = int(time.time())
    credit = CreditRequest(
        peer=key.peer_id,
        coordinator=coordinator,
        amount_nanos=2 * amount,
        nonce=os.urandom(16).hex(),
        issued_at=now,
    )
    await call(coordinator_api.credit(codec.sign(credit, key, network).data))
    bond = BondRequest(
        peer=key.peer_id,
        coordinator=coordinator,
        action="lock",
        amount_nanos=amount,
        currency="TEST",
        nonce=os.urandom(16).hex(),
        issued_at=now,
    )
    await call(coordinator_api.bond(codec.sign(bond, key, network).data))


async def bonded(market: Market, name: str, **options: Any) -> Seller:
    """A running seller with a bond."""
    seller = await market.seller(name, **options)
    node = seller.node
    await lock_bond(
        node._link.call,
        node._key,
        coordinator=node._info.coordinator,
        network=node._info.network,
    )
    return seller


@contextmanager
def lying(when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Sellers run another command than was ordered, which prints nothing and succeeds."""
    honest = OrderRun._spec

    def lie(*given: Any) -> JobSpec:
        spec = honest(*given)
        return replace(spec, command=("guest", "q")) if when() else spec

    with mock.patch.object(OrderRun, "_spec", lie):
        yield


@contextmanager
def lines(transport: httpx.AsyncBaseTransport) -> Iterator[None]:
    """Desks reach the coordinator through this transport."""

    def link(*_: object, **__: object) -> CoordinatorLink:
        return CoordinatorLink(URL, transport=transport)

    with (
        mock.patch("lumaris.disputes.open_link", link),
        mock.patch("lumaris.disputes.link_in", link),
    ):
        yield


@asynccontextmanager
async def desk_of(market: Market, state: Path) -> AsyncIterator[DisputeDesk]:
    """The desk over a folder, as a command opens it."""
    with lines(market.line):
        async with open_desk(Profile(state, URL)) as desk:
            yield desk


async def draw(market: Market, desk: DisputeDesk, dispute: str) -> DisputeDetail:
    """Have the chores run until a checker is drawn: first its list is logged, then comes the draw.

    The dispute after it.
    """
    for _ in range(_ROUNDS):
        market.clock.ahead_s += 2
        await market.coordinator.run_chores()
        found = await desk.show(dispute)
        if found.checkers:
            return found
    raise AssertionError("no checker was drawn")


async def bond_of(market: Market, peer: str) -> int:
    """What is locked."""
    return await balance(market, f"bond:{peer}:TEST")


async def balance(market: Market, account: str) -> int:
    """The balance of a ledger account."""
    rows = await market.coordinator.store.read(
        lambda c: c.execute("SELECT balance FROM account WHERE id = ?", (account,)).fetchall()
    )
    return int(rows[0][0]) if rows else 0
