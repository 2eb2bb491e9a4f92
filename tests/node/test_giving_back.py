"""What a lease had is free again, whatever became of it; and soon enough for who comes next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from msgspec import structs
from trio.testing import MockClock, wait_all_tasks_blocked

from lumaris.buyer import Buyer
from lumaris_node.capability.meter import Gpus
from lumaris_node.desk import Desk
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.limits import GIB, MIB
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.messages.advert import Gpu, Resources
from lumaris_protocol.protocols import SESSION
from tests import market as m
from tests.market import Market
from tests.node.capability.test_gpu import DEVICES, H100
from tests.node.test_hostile import Attack, sent

GPU = Gpu(model=H100, vram_bytes=80 * GIB, count=2)


def ask_for_gpus(buyer: Buyer) -> None:
    """From here on every session of the buyer is one with both GPUs."""
    needs_of = buyer.pool.needs

    def needs(*arguments: Any) -> Any:
        found = needs_of(*arguments)
        return structs.replace(found, resources=structs.replace(found.resources, gpus=(GPU,)))

    buyer.pool.needs = needs  # type: ignore[method-assign, assignment]


@pytest.mark.slow
@pytest.mark.planet
async def test_a_refused_opening_holds_no_gpus(market: Market):
    total = Resources(cpu_millis=2000, memory_bytes=256 * MIB, disk_bytes=256 * MIB, gpus=(GPU,))
    seller = await market.seller(total=total)
    seller.node._sessions._gpus = gpus = Gpus(DEVICES[:2])
    async with market.buyer() as buyer:
        ask_for_gpus(buyer)
        attack = Attack(market, seller, buyer)
        machine, _ = await attack.agreed()
        again = BuyerSession(machine.contract, machine._chain._key, network=m.NETWORK, now=0)
        assert await attack.say(SESSION, sent(again.open(b""))) not in ("", "reset")
        assert not gpus._leases
    market.clock.ahead_s += 60
    seller.node._desk.expire()


@pytest.mark.slow
@pytest.mark.planet
async def test_a_lease_of_gpus_that_are_gone_costs_nothing(market: Market):
    total = Resources(cpu_millis=2000, memory_bytes=256 * MIB, disk_bytes=256 * MIB, gpus=(GPU,))
    seller = await market.seller(total=total)
    seller.node._sessions._gpus = gpus = Gpus(DEVICES[:1])  # the other has left its bus
    async with market.buyer() as buyer:
        ask_for_gpus(buyer)
        with pytest.raises(LumarisError, match="no_capacity"):
            await buyer.run(market.request("sum"))
        assert not gpus._leases
        await market.assert_at_rest(buyer, cost_nanos=0)
    market.clock.ahead_s += 60
    seller.node._desk.expire()


class Quotes:
    """A desk without room until `room` says otherwise."""

    def __init__(self) -> None:
        self.room, self.asked = False, 0

    def offer(self, *_: object, **__: object) -> str:
        self.asked += 1
        if not self.room:
            raise RefusedError("no_capacity")
        return "quote"

    def release(self, hold: object) -> None:
        pass


class Asked:
    """A desk, and a lease of it."""

    def __init__(self) -> None:
        self.quotes = Quotes()
        parts: Any = self.quotes, None, None
        rest: Any = {"store": None, "advert": lambda: None, "clock": lambda: 0.0}
        self.desk = Desk(*parts, **rest, changed=lambda: None)
        self.hold: Any = SimpleNamespace(quote=SimpleNamespace(hash="q"))

    async def ask(self) -> Any:
        request: Any = None
        key: Any = SimpleNamespace(peer_id="")
        return await self.desk._offer(request, key)


async def test_a_full_desk_says_so_at_once(autojump_clock: MockClock):
    asked, began = Asked(), trio.current_time()
    with pytest.raises(RefusedError, match="no_capacity"):
        await asked.ask()
    assert trio.current_time() == began


async def test_a_desk_waits_for_a_lease_that_is_ending(autojump_clock: MockClock):
    asked, got = Asked(), []
    asked.desk.ending(asked.hold)

    async def ask() -> None:
        got.append(await asked.ask())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        asked.quotes.room = True
        asked.desk.release(asked.hold)
    assert got == ["quote"]
    assert asked.quotes.asked == 2


async def test_a_desk_does_not_wait_for_long(autojump_clock: MockClock):
    asked, began = Asked(), trio.current_time()
    asked.desk.ending(asked.hold)
    with pytest.raises(RefusedError, match="no_capacity"):
        await asked.ask()
    assert 0.4 < trio.current_time() - began < 0.6
