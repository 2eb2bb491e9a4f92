"""The owner's hand: pausing, the hours, and what frozen jobs cost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lumaris.buyer import Buyer
from lumaris.jobs import JobResult, JobUpdate, LogLine
from lumaris_node import config
from lumaris_node.config import Schedule
from lumaris_node.owner import PAUSE_S_MAX, Owner, is_open
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import PIDS_MAX
from tests.market import Market, eventually
from tests.node.puppet import Guest, PuppetNode

# --- the hours ---


@pytest.mark.parametrize(
    ("days", "hours", "at", "is_selling"),
    [
        (config.DAYS, (), "2026-11-23 03:00", True),
        (("sat", "sun"), (), "2026-11-23 03:00", False),  # a Monday
        (("mon",), (), "2026-11-23 23:59", True),
        (config.DAYS, ("22:00-06:00",), "2026-11-23 21:59", False),
        (config.DAYS, ("22:00-06:00",), "2026-11-23 22:00", True),
        (config.DAYS, ("22:00-06:00",), "2026-11-24 05:59", True),
        (config.DAYS, ("22:00-06:00",), "2026-11-24 06:00", False),
        (("mon",), ("22:00-06:00",), "2026-11-24 05:59", True),
        (("tue",), ("22:00-06:00",), "2026-11-24 05:59", False),
        (("sun",), ("22:00-06:00",), "2026-11-23 05:59", True),
        (config.DAYS, ("08:00-09:00", "12:00-24:00"), "2026-11-23 23:59", True),
        (config.DAYS, ("08:00-09:00", "12:00-24:00"), "2026-11-23 11:59", False),
        (config.DAYS, ("08:00-08:00",), "2026-11-23 03:00", True),  # round the clock
    ],
)
def test_the_hours(days: tuple[config.Day, ...], hours: tuple[str, ...], at: str, is_selling: bool):
    schedule = Schedule(days=days, hours=hours)
    assert is_open(schedule, datetime.fromisoformat(at)) is is_selling


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[schedule]\nhours = ["25:00-26:00"]', "hours"),
        ('[schedule]\nhours = ["8-9"]', "hours"),
        ('[schedule]\ndays = ["monday"]', "days"),
        ("[share]\npids_max = 0", "pids_max"),
        (f"[share]\npids_max = {PIDS_MAX + 1}", "pids_max"),
        ('[share]\nencryption = "rot13"', "encryption"),
        ('[accept]\negress = ["anywhere"]', "egress"),
        ('[accept]\negress = ["a.example:0"]', "egress"),
        ('[accept]\nregistries = ["https://a.example"]', "registries"),
        ("[accept]\nbuyer_images = 1", "buyer_images"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(LumarisError) as caught:
        config.load(tmp_path)
    assert caught.value.code == "config_invalid"
    assert named in caught.value.message


def test_good_settings(tmp_path: Path):
    (tmp_path / "node.toml").write_text(
        '[schedule]\ndays = ["sat", "sun"]\nhours = ["22:00-06:00"]\n'
        '[accept]\negress = ["*.example.org:443", "*:80"]\nregistries = ["localhost:5000"]\n'
        '[share]\nencryption = "off"\npids_max = 64\n'
    )
    found = config.load(tmp_path)
    assert found.schedule.hours == ("22:00-06:00",)
    assert found.share.pids_max == 64


# --- the hand ---


@dataclass
class Host:
    ended: list[str] = field(default_factory=list)

    def end(self, reason: str) -> None:
        self.ended.append(reason)


@dataclass
class Sessions:
    hosts: tuple[Host, ...] = ()
    paused: list[bool] = field(default_factory=list)

    def pause_by_owner(self, *, paused: bool) -> None:
        self.paused.append(paused)


@dataclass
class Adverts:
    withdrawn_for: str = ""
    changes: int = 0

    def changed(self, *, always: bool = False) -> None:
        assert always
        self.changes += 1


async def test_a_pause_is_bounded(autojump_clock: MockClock):
    sessions, adverts = Sessions((Host(),)), Adverts()
    owner = Owner(sessions, adverts, Schedule(), clock=lambda: 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owner.run)
        found = await owner.pause()
        assert await owner.pause() == found, "again changes nothing"
        assert (found["paused"], found["selling"]) == (True, False)
        assert adverts.withdrawn_for == "paused_by_owner"
        await trio.sleep(PAUSE_S_MAX - 5)
        assert sessions.hosts[0].ended == []
        await trio.sleep(10)
        assert sessions.hosts[0].ended == ["killed_owner"]
        await trio.sleep(60)
        assert len(sessions.hosts[0].ended) == 1
        assert (await owner.resume())["selling"]
        assert adverts.withdrawn_for == ""
        assert (sessions.paused, adverts.changes) == ([True, False], 2)
        await trio.sleep(2 * PAUSE_S_MAX)
        assert len(sessions.hosts[0].ended) == 1
        nursery.cancel_scope.cancel()


async def test_outside_its_hours_running_work_goes_on(autojump_clock: MockClock):
    sessions, adverts = Sessions((Host(),)), Adverts()
    now = datetime(2026, 11, 23, 12, 0).timestamp()  # noqa: DTZ001 - hours are local

    def clock() -> float:
        return now + trio.current_time() - began

    began = trio.current_time()
    owner = Owner(sessions, adverts, Schedule(hours=("13:00-14:00",)), clock=clock)
    assert adverts.withdrawn_for == "paused_by_owner", "from the first moment"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owner.run)
        await trio.sleep(3600 + 5)
        assert adverts.withdrawn_for == ""
        await trio.sleep(3600)
        assert adverts.withdrawn_for == "paused_by_owner"
        assert not owner.selling
        assert "Outside its hours" in owner.status()["status"]
        assert sessions.paused == []
        assert sessions.hosts[0].ended == []
        assert not (await owner.resume())["selling"], "the hours still hold"
        nursery.cancel_scope.cancel()


# --- in a market ---


@dataclass
class Scene:
    buyer: Buyer
    guest: Guest
    owner: Owner
    node: PuppetNode
    states: list[str]
    results: list[JobResult]


@asynccontextmanager
async def running(
    market: Market, monkeypatch: pytest.MonkeyPatch, **changes: int
) -> AsyncIterator[Scene]:
    monkeypatch.setattr("tests.market.SmallNode", PuppetNode)
    seller = await market.seller()
    node = seller.node
    assert isinstance(node, PuppetNode)
    owner = Owner(node._sessions, node._adverts, Schedule(), clock=node.clock)
    states: list[str] = []
    results: list[JobResult] = []

    def observe(event: JobUpdate | LogLine) -> None:
        if isinstance(event, JobUpdate):
            states.append(event.state)

    async with market.buyer() as buyer, trio.open_nursery() as nursery:

        async def run() -> None:
            results.append(await buyer.run(market.request("w", **changes), observe=observe))

        nursery.start_soon(run)
        guest = await node.puppet.guest()
        await eventually(lambda: "running" in states, "the buyer knows that it runs")
        yield Scene(buyer, guest, owner, node, states, results)
        guest.end()


@pytest.mark.slow
async def test_a_paused_job_is_frozen_and_goes_on(market: Market, monkeypatch: pytest.MonkeyPatch):
    async with running(market, monkeypatch) as scene:
        await scene.owner.pause()
        await eventually(lambda: scene.guest.frozen, "it is frozen")
        await eventually(lambda: scene.states[-1] == "paused", "the buyer is told")
        host = scene.node._sessions.hosts[0]
        run = host.find_live(1)
        before = run._elapsed_s()
        await trio.testing.wait_all_tasks_blocked()
        assert run._elapsed_s() == before, "neither clock nor bill goes on"
        with pytest.raises(LumarisError) as caught:
            scene.node._adverts.current()
        assert caught.value.code == "paused_by_owner"
        await scene.owner.resume()
        await eventually(lambda: not scene.guest.frozen, "it goes on")
        await eventually(lambda: scene.states[-1] == "running", "the buyer is told")
        scene.guest.end()
        await eventually(lambda: bool(scene.results), "it ended")
        assert scene.results[0].ok


@pytest.mark.slow
async def test_two_causes_of_a_pause(market: Market, monkeypatch: pytest.MonkeyPatch):
    """What is unpaid and what the owner wants hold a job up apart from each other."""
    async with running(market, monkeypatch) as scene:
        host = scene.node._sessions.hosts[0]

        async def frozen(expected: bool) -> None:
            await eventually(lambda: scene.guest.frozen is expected, f"frozen is {expected}")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert scene.guest.frozen is expected

        from lumaris_protocol.effects import SetGate

        for first, second in ((0, 1), (1, 0)):
            causes = (
                lambda on: host.apply([SetGate(not on)]),
                lambda on: host.pause_by_owner(paused=on),
            )
            causes[first](True)
            await frozen(True)
            causes[second](True)
            causes[first](False)
            await frozen(True)
            causes[second](False)
            await frozen(False)
        assert scene.guest.freezes == 2


@pytest.mark.slow
async def test_a_long_pause_costs_what_was_vouchered(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lumaris_node.owner.PAUSE_S_MAX", 0)
    async with running(market, monkeypatch) as scene, trio.open_nursery() as nursery:
        nursery.start_soon(scene.owner.run)
        await scene.owner.pause()
        await eventually(lambda: bool(scene.results), "the job has ended")
        result = scene.results[0]
        assert result.reason == "killed_owner"
        rows = await scene.buyer.store.sessions(1)
        assert result.cost_nanos == rows[0]["total_nanos"]
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_paused_node_is_not_bought(market: Market, monkeypatch: pytest.MonkeyPatch):
    async with running(market, monkeypatch) as scene:
        await scene.owner.pause()
        await eventually(lambda: not scene.buyer.market.adverts, "the offer is withdrawn")
        await scene.owner.resume()
        await eventually(lambda: bool(scene.buyer.market.adverts), "and comes back")
