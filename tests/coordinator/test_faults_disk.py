"""Disks that fail under the coordinator: power cuts, a full disk, errors of reading and writing.

The file systems are real ones; nothing here is told by the code under test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio

from lumaris_coordinator.store import sqlite
from lumaris_coordinator.store import writer as writers
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Clock, Market
from tests.coordinator.conftest import open_market
from tests.coordinator.faults.invariants import Told, hold
from tests.coordinator.faults.victim import victim
from tests.coordinator.faults.volumes import Disk, disk

pytestmark = pytest.mark.slow

CUTS_MAX = 10


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has failed is not waited for."""
    monkeypatch.setattr(writers, "WRITE_AGAIN_S_MAX", 0.0)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path) as found:
        yield found


@asynccontextmanager
async def doomed(found: Disk) -> AsyncIterator[Market]:
    """A coordinator whose last heartbeat may fail, because its disk has gone."""
    ending = False
    try:
        async with open_market(found.state) as market:
            yield market
            ending = True
    except (LumarisError, BaseExceptionGroup):
        if not ending:
            raise


async def end_among_settlements(found: Disk, told: Told, end: Callable[[], None]) -> list[bytes]:
    """Settle some, lose the disk, try some more; the claims that were sent."""
    async with doomed(found) as market:
        claims = await told.claims(market, 6)
        await told.settle_all(market, claims[:4])
        end()
        await told.settle_all(market, claims[4:])
        assert [answer.json()["code"] for answer in told.refused] == ["busy", "busy"]
        assert (await market.client.get("/readyz")).status_code == 503
    found.restart()
    return claims


@pytest.mark.parametrize("end", [Disk.cut_power, Disk.turn_read_only])
async def test_a_power_cut_loses_nothing_that_was_acknowledged(
    ext4: Disk, end: Callable[[Disk], None]
) -> None:
    told = Told()
    claims = await end_among_settlements(ext4, told, partial(end, ext4))
    assert len(told.receipts) == 4
    async with open_market(ext4.state) as market:
        settings = market.coordinator.settings
        hold(settings, told, coordinator=market.peer)
        await told.again(market, claims)
        hold(settings, told, coordinator=market.peer)


async def test_a_power_cut_is_seen_to_lose_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the test above would see a loss: the same, with commits that do not wait for the disk.

    The kernel may by chance have written everything in time, so it is tried more than once.
    """
    connect = sqlite.connect

    def careless(path: Path, *, read_only: bool = False) -> sqlite.Connection:
        connection = connect(path, read_only=read_only)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    for number in range(CUTS_MAX):
        folder = tmp_path / str(number)
        folder.mkdir()
        with disk(folder) as found:
            told = Told()
            with monkeypatch.context() as patched:
                patched.setattr(sqlite, "connect", careless)
                await end_among_settlements(found, told, found.cut_power)
            async with open_market(found.state) as market:
                try:
                    hold(market.coordinator.settings, told, coordinator=market.peer)
                except AssertionError:
                    return
    pytest.fail(f"{CUTS_MAX} power cuts lost nothing: this does not cut the power")


async def test_a_full_disk_refuses_and_heals_with_space(ext4: Disk) -> None:
    told = Told()
    async with open_market(ext4.state) as market:
        settings, store = market.coordinator.settings, market.coordinator.store
        claims = await told.claims(market, 40)
        await told.settle(market, claims[0])
        with ext4.full():
            for claim in claims[1:]:  # until the space that the log has already is used up
                await told.settle(market, claim)
                if told.refused:
                    break
            assert told.refused[0].json()["code"] == "busy"
            assert not store.health().ready
            hold(settings, told, coordinator=market.peer)
        with trio.fail_after(20):
            while not store.health().writes:
                await trio.sleep(0.01)
        await told.again(market, claims)
        hold(settings, told, coordinator=market.peer)


async def test_what_is_acknowledged_after_a_disk_error_survives_a_power_cut(
    tmp_path: Path,
) -> None:
    """Linux tells of a failed sync once, keeps what it could not write in memory as if it had, and
    lets the next sync succeed without it. What is committed on top of that must not be lost."""
    told = Told()
    with disk(tmp_path, journal=False) as found:
        async with doomed(found) as market:
            settings, store = market.coordinator.settings, market.coordinator.store
            claims = await told.claims(market, 4)
            await told.settle(market, claims[0])
            begin_the_log_anew(found)
            with found.failing():
                await told.settle(market, claims[1])
            assert [answer.json()["code"] for answer in told.refused] == ["busy"]
            with trio.fail_after(20):
                while not store.health().writes:
                    await trio.sleep(0.01)
            await told.settle(market, claims[2])
            assert len(told.receipts) == 2
            found.cut_power()
        found.restart()
        async with open_market(found.state) as market:
            hold(settings, told, coordinator=market.peer)
            await told.again(market, claims)
            hold(settings, told, coordinator=market.peer)


async def test_what_a_killed_program_could_not_write_is_written_before_the_next_serves(
    tmp_path: Path,
) -> None:
    """As above, but nobody is left who knows which of the log never reached the disk: the next
    start reads all of it out of memory."""
    told = Told()
    with disk(tmp_path, journal=False) as found:
        async with open_market(found.state) as market:
            claims = await told.claims(market, 4)
            settings = market.coordinator.settings
        with victim(settings, None, tmp_path / "armed") as dying:
            async with httpx.AsyncClient(base_url=dying.url, timeout=30) as client:
                market = Market(cast("Any", dying), client, Clock())
                await told.settle(market, claims[0])
                begin_the_log_anew(found)
                with found.failing():
                    await told.settle(market, claims[1])
                    dying.kill()
                    assert dying.died()
        assert [answer.json()["code"] for answer in told.refused] == ["busy"]
        async with doomed(found) as market:
            await told.settle(market, claims[2])
            found.cut_power()
        assert len(told.receipts) == 2
        found.restart()
        async with open_market(found.state) as market:
            hold(settings, told, coordinator=market.peer)
            await told.again(market, claims)
            hold(settings, told, coordinator=market.peer)


def begin_the_log_anew(found: Disk) -> None:
    """The next commit is written over blocks that the file has already, so that only its data is
    refused: a file system that cannot read its own tables waits for ever."""
    with closing(sqlite.connect(found.state / "coordinator.db")) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
