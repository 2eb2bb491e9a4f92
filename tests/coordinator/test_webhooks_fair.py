"""Webhooks among strangers: slow endpoints, slow names and revoked owners hold up nobody else."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from lumaris_coordinator import bounds
from lumaris_coordinator.store.port import all_rows
from lumaris_coordinator.webhooks import outgoing
from lumaris_coordinator.webhooks.outgoing import PinnedSender, Post
from tests.coordinator.builders import Market
from tests.coordinator.test_events import tell, until
from tests.coordinator.test_webhooks import URL, Endpoint, endpoint, make, show

__all__ = ["endpoint"]


class Gated:
    """Endpoints whose URL says `slow` answer when a test says so."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.gate = trio.Event()
        self.waiting = self.most = 0

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Post]:
        async def post(body: bytes, headers: dict[str, str]) -> int:
            if "slow" in url:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
                await self.gate.wait()
                self.waiting -= 1
            self.got.append(url)
            return 204

        yield post


async def test_slow_endpoints_of_one_owner_leave_places_to_others(market: Market) -> None:
    sender = Gated()
    market.coordinator.deliveries._sender = sender
    ann, bob = await market.party("ann"), await market.party("bob")
    for number in range(16):
        await make(market, ann, key=f"k{number}", url=f"https://slow.example/{number}")
    await make(market, bob)
    await tell(market, ann, bob)
    await until(lambda: sender.got == [URL] and sender.waiting == 2)
    sender.gate.set()
    await until(lambda: len(sender.got) == 17)
    assert sender.most == 2


async def test_slow_endpoints_of_many_owners_leave_places_as_well(market: Market) -> None:
    sender, deliveries = Gated(), market.coordinator.deliveries
    deliveries._sender = sender
    owners = [await market.party(f"owner{number}") for number in range(10)]
    for number, owner in enumerate(owners):
        made = await make(market, owner, url=f"https://slow.example/{number}")
        deliveries._note_pace(made["id"], bounds.WEBHOOK_SLOW_S + 1)
    bob = await market.party("bob")
    await make(market, bob)
    await tell(market, *owners, bob)
    slow = bounds.WEBHOOKS_SLOW_CONCURRENT_MAX
    await until(lambda: sender.got == [URL] and sender.waiting == slow)
    sender.gate.set()
    await until(lambda: len(sender.got) == 11)
    assert sender.most == slow


async def test_a_turn_has_an_end(
    market: Market, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it is delivered in the next one, in order."""
    monkeypatch.setattr("lumaris_coordinator.webhooks.delivery.WEBHOOK_TURN_S_MAX", -1)
    ann = await market.party("ann")
    made = await make(market, ann)
    monkeypatch.setattr(market.coordinator.deliveries, "hear", lambda events: None)
    await tell(market, ann, number=3)
    assert await market.coordinator.deliveries.turn(made["id"])
    assert endpoint.got == []
    monkeypatch.setattr("lumaris_coordinator.webhooks.delivery.WEBHOOK_TURN_S_MAX", 5)
    await market.coordinator.deliveries.turn(made["id"])
    assert endpoint.ids == sorted(endpoint.ids)
    assert len(endpoint.ids) == 3


async def test_waiting_for_a_look_up_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def resolve(host: str, port: int) -> list[Any]:
        await trio.sleep(0.9 * bounds.WEBHOOK_ATTEMPT_S_MAX)
        return [(2, 1, 6, "", ("1.1.1.1", port))]

    monkeypatch.setattr("lumaris_coordinator.webhooks.outgoing.look_up", resolve)
    sender, opened = PinnedSender(), 0

    async def one() -> None:
        nonlocal opened
        async with sender.open(URL):
            opened += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3 * bounds.WEBHOOK_LOOKUPS_MAX):
            nursery.start_soon(one)
    assert opened == 3 * bounds.WEBHOOK_LOOKUPS_MAX


async def test_names_are_looked_up_in_threads_that_can_be_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def slow(host: str, port: int, **_: Any) -> list[Any]:
        go_on.wait(20)
        return []

    monkeypatch.setattr("socket.getaddrinfo", slow)
    with trio.move_on_after(0.01) as scope:
        await outgoing.look_up("slow.example", 443)
    assert scope.cancelled_caught
    go_on.set()
    assert await outgoing.look_up("slow.example", 443) == []


async def test_a_revoked_peer_hears_no_more(market: Market, endpoint: Endpoint) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    made = await make(market, ann)
    await make(market, bob)
    revocations = market.coordinator.revocations
    await market.coordinator.store.submit(
        lambda connection: revocations.revoke(connection, [(ann.peer, 0)], reason="x")
    )
    await tell(market, ann, bob)
    await until(lambda: len(endpoint.got) == 1)  # bob's
    row = await market.coordinator.store.read(
        lambda connection: all_rows(
            connection, "SELECT state, reason FROM webhook WHERE id = ?", (made["id"],)
        )
    )
    assert row == [("disabled", "revoked")]


async def test_a_conditional_delete_is_one_step(market: Market, endpoint: Endpoint) -> None:
    """What changes between the look and the deletion is not deleted."""
    ann = await market.party("ann")
    made = await make(market, ann)
    path = f"/v1/webhooks/{made['id']}"
    tag = (await market.client.get(path, headers=market.bearer(ann))).headers["etag"]
    webhooks, true = market.coordinator.webhooks, market.coordinator.store.submit

    async def late(operation: Any) -> Any:
        await true(lambda found: found.execute("UPDATE webhook SET seen = seen + 1").rowcount)
        return await true(operation)

    object.__setattr__(webhooks._context.store, "submit", late)
    headers = {**market.bearer(ann), "if-match": tag}
    answer = await market.client.delete(path, headers=headers)
    object.__setattr__(webhooks._context.store, "submit", true)
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert (await show(market, ann, made["id"]))["id"] == made["id"]
