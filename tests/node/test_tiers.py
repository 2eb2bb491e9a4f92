"""What a node offers, and what it says of a tier that it does not offer."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris_node import tiers
from lumaris_node.config import Accept, NodeConfig
from lumaris_node.selftest import suite
from lumaris_node.selftest.keep import Assurance
from lumaris_node.selftest.rows import SUITE_VERSION, Row
from lumaris_node.selftest.suite import Report
from lumaris_node.tiers import Tiers
from lumaris_protocol.messages.advert import Runtime
from tests.node.puppet import Puppet


class Tier(Puppet):
    """A container tier whose engine comes and goes."""

    tier = "container"

    def __init__(self) -> None:
        super().__init__()
        self.runtime: Runtime | None = Runtime(
            tier="container", version="docker-20", assurance="container", features=("exec",)
        )
        self.left = 0

    async def probe(self) -> Runtime | None:
        self.why_not = "" if self.runtime else "No container engine answers."
        return self.runtime

    async def reap_left(self) -> int:
        found, self.left = self.left, 0
        return found


class Market:
    def __init__(self, tier: Tier, folder: Path) -> None:
        config = NodeConfig(accept=Accept(runtimes=("container",)))
        self.tiers = Tiers(config, make=lambda _: tier, assurance=Assurance(folder))
        self.changes = trio.Event()

    def changed(self) -> None:
        self.changes.set()

    async def change(self) -> None:
        with trio.fail_after(20):
            await self.changes.wait()
        self.changes = trio.Event()


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the next attacks are held off."""
    told = [True]

    async def run(_: Any, runtime: Runtime, __: Path, *, clock: Any) -> Report:
        rows = (Row("mount", told[0]),)
        named = runtime.tier, runtime.version, runtime.assurance
        return Report(*named, SUITE_VERSION, int(clock()), 0.1, rows)

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(tiers, "_LOOK_S", {"container": 0.01})
    return told


async def test_a_tier_is_reported_with_what_it_is_worth_or_why_it_is_not_offered(
    tmp_path: Path, holds: list[bool]
):
    tier = Tier()
    market = Market(tier, tmp_path)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await market.tiers.open(stack)
        (before,) = market.tiers.report()
        assert (before["offered"], before["why_not"]) == (False, "Its self-test has not ended yet.")
        nursery.start_soon(market.tiers.watch, market.changed)
        await market.change()
        (found,) = market.tiers.report()
        assert found["offered"]
        assert (found["assurance"], found["suite"]) == ("container", SUITE_VERSION)
        assert found["tested_at"] > 0
        assert list(found["features"]) == ["exec"]

        holds[0] = False
        market.tiers.retest()
        await market.change()
        (found,) = market.tiers.report()
        assert (found["offered"], found["why_not"]) == (False, "Attacks succeeded: mount.")
        nursery.cancel_scope.cancel()


async def test_what_an_engine_left_is_ended_when_it_is_back(tmp_path: Path, holds: list[bool]):
    tier = Tier()
    market = Market(tier, tmp_path)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await market.tiers.open(stack)
        nursery.start_soon(market.tiers.watch, market.changed)
        await market.change()
        there, tier.runtime, tier.left = tier.runtime, None, 2
        await market.change()
        (found,) = market.tiers.report()
        assert (found["offered"], found["why_not"]) == (False, "No container engine answers.")
        assert tier.left == 2
        tier.runtime = there
        await market.change()
        assert tier.left == 0
        assert market.tiers.report()[0]["offered"]
        nursery.cancel_scope.cancel()
