"""Who is served, who waits, and for how long."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lumaris_overlay.bulk import ask, turns, wire
from lumaris_overlay.bulk.ask import Patience
from lumaris_overlay.bulk.turns import Turns
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import BULK_TRANSFERS_MAX


class Table:
    """Transfers that last until the test ends them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.turns, self._nursery = Turns(), nursery
        self.running: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._ends: dict[str, list[trio.Event]] = {}

    async def come(self, peer: str, count: int = 1) -> None:
        for _ in range(count):
            self._nursery.start_soon(self._transfer, peer)
            await wait_all_tasks_blocked()

    async def end_one(self, peer: str) -> None:
        self._ends[peer].pop().set()
        await wait_all_tasks_blocked()

    async def _transfer(self, peer: str) -> None:
        end = trio.Event()
        try:
            async with self.turns.turn(peer):
                self.running[peer] += 1
                self._ends.setdefault(peer, []).append(end)
                await end.wait()
                self.running[peer] -= 1
        except RefusedError:
            self.refused[peer] += 1


@pytest.fixture
async def table():
    async with trio.open_nursery() as nursery:
        yield Table(nursery)
        nursery.cancel_scope.cancel()


async def test_one_too_many_waits_its_turn(table: Table):
    await table.come("a", turns._PER_PEER_MAX + 1)
    assert table.running["a"] == turns._PER_PEER_MAX
    await table.end_one("a")
    assert (table.running["a"], table.refused["a"]) == (turns._PER_PEER_MAX, 0)


async def test_waiting_ends_before_the_peer_gives_us_up(table: Table, autojump_clock: MockClock):
    await table.come("a", turns._PER_PEER_MAX + 1)
    began = trio.current_time()
    while not table.refused["a"]:
        await trio.sleep(0.5)
    assert trio.current_time() - began < wire.STALL_S - 5
    await table.end_one("a")
    assert table.running["a"] == turns._PER_PEER_MAX - 1


async def test_a_few_peers_leave_room_for_others(table: Table):
    for peer in "abcd":
        await table.come(peer, 20)
    for peer in "efg":
        await table.come(peer)
    assert all(table.running[peer] == 1 for peer in "efg")
    assert table.running.total() <= BULK_TRANSFERS_MAX
    assert table.running["a"] == turns._PER_PEER_MAX


async def test_who_has_the_fewest_is_next(table: Table):
    for peer in "abcdefgh":
        await table.come(peer, 20)
    assert table.running.total() == BULK_TRANSFERS_MAX
    await table.come("new")
    assert table.running["new"] == 0
    await table.end_one("a")
    assert table.running["new"] == 1


async def test_few_wait(table: Table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_WAITING_PER_PEER_MAX", 2)
    monkeypatch.setattr(turns, "_WAITING_MAX", 3)
    await table.come("a", turns._PER_PEER_MAX + 3)
    assert table.refused["a"] == 1
    await table.come("b", turns._PER_PEER_MAX + 2)
    assert table.refused["b"] == 1


async def test_who_was_waiting_and_left_takes_no_turn(table: Table):
    await table.come("a", turns._PER_PEER_MAX)
    with trio.CancelScope() as scope:
        scope.cancel()
        async with table.turns.turn("a"):
            raise AssertionError
    await table.end_one("a")
    await table.come("a", 1)
    assert table.running["a"] == turns._PER_PEER_MAX


async def test_a_busy_peer_is_asked_for_a_minute(autojump_clock: MockClock):
    patience, began, asked = Patience(), trio.current_time(), 0
    while await patience.wait():
        asked += 1
    assert ask._BUSY_S <= trio.current_time() - began < ask._BUSY_S + 10
    assert 5 < asked < 30
