"""Events end: a reader that was away for longer is told so, and no number is given twice."""

from __future__ import annotations

from typing import Any

import pytest

from lumaris_coordinator.events import retention
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party
from tests.coordinator.test_events import BOTH, sse, tell, until

KEPT_S = 90 * 24 * 3600


async def prune(market: Market) -> int:
    coordinator = market.coordinator
    return await retention.prune(
        coordinator.store, now=market.now, kept_s=coordinator.settings.events_kept_s
    )


async def aged(market: Market, ann: Party) -> None:
    """Five events, of which the first three are too old."""
    await tell(market, ann, number=3)
    market.clock.now += KEPT_S - 10
    await tell(market, ann, number=2)
    assert await prune(market) == 0
    market.clock.now += 11
    await market.register(ann)  # the token has ended as well


async def page(market: Market, party: Party, after: int) -> Any:
    return await market.client.get(
        "/v1/events/page", params={"after": after}, headers=market.bearer(party)
    )


async def test_old_events_go_and_their_readers_are_told(market: Market) -> None:
    ann = await market.party("ann")
    await aged(market, ann)
    assert await prune(market) == 3
    for after, shown in ((0, [4, 5]), (3, [4, 5]), (4, [5]), (5, [])):
        answer = await page(market, ann, after)
        assert [event["id"] for event in answer.json()["events"]] == shown
    for after in (1, 2):
        answer = await page(market, ann, after)
        assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")
        assert "4" in answer.json()["detail"]
    headers = {**market.bearer(ann), "last-event-id": "2"}
    answer = await market.client.get("/v1/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")
    assert market.coordinator.events.streams == 0


@BOTH
async def test_a_stream_from_a_place_that_is_gone(market: Market, opened: Any) -> None:
    ann = await market.party("ann")
    await aged(market, ann)
    await market.coordinator.run_chores()  # the timer prunes
    async with opened(market, ann, "after=2") as wire:
        await until(lambda: wire.done)
    assert "cursor_expired" in str(wire.sent)
    async with opened(market, ann, "after=3") as wire:
        await until(lambda: wire.ids == [4, 5])


async def test_the_newest_is_kept_for_its_number(market: Market) -> None:
    ann = await market.party("ann")
    await tell(market, ann, number=3)
    market.clock.now += 2 * KEPT_S
    assert await prune(market) == 2
    assert await prune(market) == 0
    assert await tell(market, ann) == 4
    await market.register(ann)
    async with sse(market, ann, "after=2") as wire:
        await until(lambda: wire.ids == [3, 4])


async def test_many_go_in_small_transactions(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await market.party("ann")
    monkeypatch.setattr(retention, "EVENTS_PRUNED_AT_ONCE_MAX", 2)
    monkeypatch.setattr(retention, "EVENTS_PRUNED_PER_ROUND_MAX", 6)
    await tell(market, ann, number=10)
    market.clock.now += 2 * KEPT_S
    before = market.coordinator.store.writer.stats.operations
    assert await prune(market) == 6
    assert market.coordinator.store.writer.stats.operations - before == 3

    def left(connection: Connection) -> tuple[int, ...]:
        found = first(connection, "SELECT min(id), count(*) FROM event")
        told = first(connection, "SELECT min(event), count(*) FROM event_party")
        return (*(found or ()), *(told or ()))

    assert await market.coordinator.store.read(left) == (7, 4, 7, 4)
    assert await prune(market) == 3


async def test_a_webhook_cannot_replay_what_is_gone(market: Market) -> None:
    ann = await market.party("ann")
    await aged(market, ann)
    await prune(market)

    async def ask(method: str, path: str, key: str, **details: Any) -> Any:
        headers = {**market.bearer(ann), "idempotency-key": key}
        return (await market.client.request(method, path, headers=headers, **details)).json()

    body = {"url": "https://hooks.example/", "kinds": []}
    made = await ask("POST", "/v1/webhooks", "make", json=body)
    replay = f"/v1/webhooks/{made['id']}/replay"
    assert (await ask("POST", f"{replay}?after=2", "two"))["code"] == "cursor_expired"
    assert (await ask("POST", f"{replay}?after=3", "three"))["seen"] == 3
    assert (await ask("POST", f"{replay}?after=0", "all"))["seen"] == 0


async def test_a_log_that_never_had_events(market: Market) -> None:
    look = market.coordinator.store.read
    await look(lambda connection: retention.check_cursor(connection, 0))
    with pytest.raises(LumarisError, match="cursor_expired"):  # of another time
        await look(lambda connection: retention.check_cursor(connection, 7))
    assert await prune(market) == 0
    with pytest.raises(LumarisError, match="config_invalid"):
        type(market.coordinator.settings)(state=market.coordinator.settings.state, events_kept_s=60)
