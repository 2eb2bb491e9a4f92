"""The buyer's view of the network: what it knows, what it finds, and whom it asks for the rest."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import pytest
import trio
from msgspec import structs
from trio.testing import MockClock

from lumaris.market import BuyerTerms, Market
from lumaris_node.capability.advert import AdvertPublisher
from lumaris_node.tender import Tenders
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import AdvertEvent, DemandEvent, OverlayStream
from lumaris_overlay.simulated import SimulatedNetwork, SimulatedOverlay, open_network
from lumaris_overlay.validate import DemandGate
from lumaris_protocol import codec, ids
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import TENDERS_MAX
from lumaris_protocol.messages.advert import Advert, Resources
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.protocols import TENDER, TenderHeader
from tests.overlay.world import COORDINATOR, KEYS, NETWORK, advert, certificate, key_of, until

BUYER = key_of("buyer")
NEEDS = Requirements(resources=Resources(cpu_millis=1000), tier="wasm", currency="TEST")


class Blind(SimulatedOverlay):
    """A host whose directory shows nothing: its sellers are in a part of the market it skips."""

    @asynccontextmanager
    async def adverts(self) -> AsyncIterator[trio.MemoryReceiveChannel[AdvertEvent]]:
        send, receive = trio.open_memory_channel[AdvertEvent](0)
        with send, receive:
            yield receive


def terms(key: KeyPair = BUYER) -> BuyerTerms:
    shown = certificate(key.peer_id, roles=("buyer",))
    return BuyerTerms(NETWORK, lambda: COORDINATOR.peer_id, 0, lambda: shown, lambda: "")


@dataclass
class World:
    network: SimulatedNetwork
    nursery: trio.Nursery
    host: SimulatedOverlay
    market: Market

    async def join(self, key: KeyPair) -> SimulatedOverlay:
        host = self.network.host(key)
        await host.connect([self.host.address])
        return host

    async def follow(self, market: Market) -> None:
        self.nursery.start_soon(market.follow)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_network(NETWORK, KEYS) as network, trio.open_nursery() as nursery:
        host = network.host(BUYER)
        market = Market(host, BUYER, terms())
        nursery.start_soon(market.follow)
        yield World(network, nursery, host, market)
        nursery.cancel_scope.cancel()


def blind(world: World) -> tuple[Blind, Market]:
    """A second buyer, that knows nobody."""
    key = key_of("blind")
    host = Blind(world.network, key, f"/ip4/10.0.9.9/tcp/9/p2p/{key.peer_id}")
    world.network._hosts[key.peer_id] = host
    market = Market(host, key, terms(key))
    world.nursery.start_soon(market.follow)
    return host, market


# --- the directory ---


async def test_the_market_follows_the_directory(autojump_clock: MockClock, world: World) -> None:
    sellers = [key_of(f"seller {n}") for n in range(3)]
    hosts = [await world.join(key) for key in sellers]
    for host, key in zip(hosts, sellers, strict=True):
        await host.publish_advert(advert(key))
    report = await world.market.search(NEEDS, lease_s=60, count=3)
    found = [item.advert.message.seller for item in report.matches]
    assert found == sorted(key.peer_id for key in sellers)
    await hosts[0].publish_advert(advert(sellers[0], 2, withdrawn=True))
    await until(lambda: len(world.market.adverts) == 2)


async def test_what_has_expired_is_not_found(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seller = await world.join(key_of("seller"))
    await seller.publish_advert(advert(key_of("seller"), lifetime_s=50))
    await until(lambda: world.market.adverts)
    later = time.time() + 55
    monkeypatch.setattr(time, "time", lambda: later)
    assert not world.market.adverts


async def test_a_busy_seller_that_has_it_all_is_asked(
    autojump_clock: MockClock, world: World
) -> None:
    busy = structs.replace(opened(advert(key_of("seller"))), free=Resources())
    world.market._put(Signed(busy, key_of("seller").peer_id, b""))
    report = await world.market.search(NEEDS, lease_s=60)
    assert [item.advert.message.free for item in report.matches] == [Resources()]


async def test_nobody_fits_and_why(autojump_clock: MockClock, world: World) -> None:
    seller = await world.join(key_of("seller"))
    await seller.publish_advert(advert(key_of("seller")))
    with pytest.raises(LumarisError) as caught:
        await world.market.search(structs.replace(NEEDS, tier="vm", currency="EUR"), lease_s=601)
    assert caught.value.code == "no_offers"
    for code in ("runtime_missing 1", "duration_long 1", "price_high 1"):
        assert code in caught.value.message
    assert "None of 1 " in caught.value.message


async def test_older_news_does_not_undo_newer(autojump_clock: MockClock, world: World) -> None:
    key = key_of("seller")
    market = world.market
    market._put(codec.open_signed(advert(key, 5), Advert, network=NETWORK))
    market._take(AdvertEvent(key.peer_id, advert(key, 4), 4))
    market._take(AdvertEvent(key.peer_id, None, 4))
    assert [item.message.seq for item in market.adverts] == [5]
    market._take(AdvertEvent(key.peer_id, None, 5))
    assert not market.adverts


async def test_an_event_with_another_sellers_advert_is_dropped(
    autojump_clock: MockClock, world: World
) -> None:
    world.market._take(AdvertEvent(key_of("a").peer_id, advert(key_of("b")), 1))
    assert world.market.adverts == ()


def opened(data: bytes) -> Advert:
    return codec.open_signed(data, Advert, network=NETWORK).message


# --- asking everybody ---


class Publisher:
    """The part of a node's publisher that tenders need."""

    def __init__(self, key: KeyPair, **changes: Any) -> None:
        self._advert = structs.replace(opened(advert(key)), **changes)
        self._key = key
        self.published = 0

    def current(self) -> Signed[Advert]:
        return codec.sign(self._advert, self._key, NETWORK)

    async def publish(self) -> None:
        await trio.lowlevel.checkpoint()
        self.published += 1
        self._advert = structs.replace(self._advert, seq=self._advert.seq + 1, free=FREE)


FREE = Resources(cpu_millis=1000)


async def sell(world: World, name: str, free: Resources = FREE, **changes: Any) -> Tenders:
    """A seller that answers demands."""
    host = await world.join(key_of(name))
    publisher = cast(AdvertPublisher, Publisher(key_of(name), **changes))
    tenders = Tenders(
        host,
        publisher,
        DemandGate(NETWORK, KEYS),
        free=lambda: free,
        clock=time.time,
        rng=random.Random(name),
    )
    world.nursery.start_soon(tenders.run)
    return tenders


async def search(market: Market, needs: Requirements = NEEDS) -> list[str]:
    report = await market.search(needs, lease_s=60)
    return [item.advert.message.seller for item in report.matches]


async def test_a_seller_nobody_knew_answers_a_demand(
    autojump_clock: MockClock, world: World
) -> None:
    host, market = blind(world)
    fitting = [await sell(world, f"seller {n}") for n in range(3)]
    unfit = await sell(world, "asia", prices=PRICEY)
    full = await sell(world, "full", free=Resources())
    await host.connect([other.address for other in all_hosts(world, host)])
    began = trio.current_time()
    found = await search(market)
    assert set(found) == {key_of(f"seller {n}").peer_id for n in range(3)}
    # Nobody is known: five seconds for the first advert, half a second of quiet, the answers.
    assert trio.current_time() - began < 8
    assert [tenders.counts for tenders in fitting] == [{"answered": 1}] * 3
    assert [tenders.counts for tenders in (unfit, full)] == [{"unfit": 1}] * 2
    await until(lambda: not any(tenders._answering for tenders in fitting))


def all_hosts(world: World, but: SimulatedOverlay) -> list[SimulatedOverlay]:
    return [host for host in world.network._hosts.values() if host is not but]


PRICEY = structs.replace(opened(advert(key_of("x"))).prices, currency="EUR")


async def test_the_same_is_not_asked_twice(autojump_clock: MockClock, world: World) -> None:
    host, market = blind(world)
    tenders = await sell(world, "seller", prices=PRICEY)
    await host.connect([other.address for other in all_hosts(world, host)])
    for _ in range(3):
        with pytest.raises(LumarisError, match="no_sellers"):
            await search(market)
    assert tenders.counts == {"unfit": 1}
    await trio.sleep(31)
    assert not market._demands._expire()
    with pytest.raises(LumarisError, match="no_sellers"):
        await search(market)
    assert tenders.counts == {"unfit": 2}


async def test_nobody_is_asked_when_all_that_fit_were_excluded(
    autojump_clock: MockClock, world: World
) -> None:
    tenders = await sell(world, "seller")
    known = codec.open_signed(advert(key_of("seller")), Advert, network=NETWORK)
    world.market._put(known)
    with pytest.raises(LumarisError, match="no_offers"):
        await search(world.market, structs.replace(NEEDS, excluded=(known.signer,)))
    assert tenders.counts == {}


async def test_an_answer_says_what_is_free_now(autojump_clock: MockClock, world: World) -> None:
    host, market = blind(world)
    tenders = await sell(world, "seller", free=FREE)
    publisher = cast(Publisher, tenders._adverts)
    publisher._advert = structs.replace(publisher._advert, free=Resources())
    await host.connect([other.address for other in all_hosts(world, host)])
    assert len(await search(market)) == 1
    assert publisher.published == 1
    assert market.adverts[0].message.free == FREE


async def test_a_second_program_on_the_same_overlay_goes_without(
    autojump_clock: MockClock, world: World
) -> None:
    host, market = blind(world)
    await sell(world, "seller")
    await host.connect([other.address for other in all_hosts(world, host)])
    async with host.serve(TENDER, never):
        with pytest.raises(LumarisError, match="no_sellers"):
            await search(market)
    assert len(await search(market)) == 1, "later it asks again"


async def never(stream: object) -> None:
    await trio.sleep_forever()


# --- what strangers send ---


async def demand_of(world: World) -> tuple[Blind, Market, Demand]:
    """A buyer with an open demand that no seller answered."""
    host, market = blind(world)
    await host.connect([world.host.address])
    heard: list[Demand] = []

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        async with world.host.demands() as events:
            task_status.started()
            event = await events.receive()
            heard.append(codec.open_signed(event.envelope, Demand, network=NETWORK).message)

    await world.nursery.start(listen)
    with pytest.raises(LumarisError):
        await search(market)
    return host, market, heard[0]


async def tender(stranger: SimulatedOverlay, host: Blind, name: str, data: bytes) -> None:
    """Send what may be a tender, until the buyer closes or resets."""
    stream = FramedStream(await stranger.open_stream(host.peer_id, TENDER))
    try:
        await stream.send(Kind.HEADER, msgspec.json.encode(TenderHeader(demand=name)))
        await stream.send(Kind.ENVELOPE, data)
        await stream.receive()
    except (trio.BrokenResourceError, RemoteError):
        pass
    finally:
        await stream.aclose()


async def test_only_valid_answers_to_open_demands_are_taken(
    autojump_clock: MockClock, world: World
) -> None:
    host, market, demand = await demand_of(world)
    key = key_of("seller")
    seller = await world.join(key)
    await seller.connect([host.address])
    good, other = advert(key), ids.make_id("demand", bytes(15))
    await tender(seller, host, other, good)
    for n, bad in enumerate((b"junk", advert(key_of("x")), advert(key, cert=b""))):
        stranger = await world.join(key_of(f"stranger {n}"))
        await stranger.connect([host.address])
        await tender(stranger, host, demand.demand, bad)
    assert not market.adverts
    await tender(seller, host, demand.demand, good)
    assert [item.message.seller for item in market.adverts] == [key.peer_id]
    await tender(seller, host, demand.demand, advert(key, 2))
    assert [item.message.seq for item in market.adverts] == [1], "one answer each"


async def test_answers_are_counted_and_late_ones_are_dropped(
    autojump_clock: MockClock, world: World
) -> None:
    host, market, demand = await demand_of(world)
    for n in range(TENDERS_MAX + 3):
        key = key_of(f"seller {n}")
        seller = await world.join(key)
        await seller.connect([host.address])
        await tender(seller, host, demand.demand, advert(key))
    assert len(market.adverts) == TENDERS_MAX
    await trio.sleep(31)
    assert TENDER not in host._handlers, "nothing is answered when no demand is open"


async def test_silent_streams_are_given_up(autojump_clock: MockClock, world: World) -> None:
    host, market, _ = await demand_of(world)
    seller = await world.join(key_of("seller"))
    await seller.connect([host.address])
    streams = [await seller.open_stream(host.peer_id, TENDER) for _ in range(40)]
    await until(lambda: market._demands._answering == 32)
    with trio.fail_after(6):
        for stream in streams:
            await ended(stream)
    assert market._demands._answering == 0


async def ended(stream: OverlayStream) -> None:
    with suppress(trio.BrokenResourceError):
        assert await stream.receive_some() == b""


# --- the seller's bounds ---


def demand_event(n: int, key: KeyPair = BUYER, **changes: Any) -> DemandEvent:
    now = int(time.time())
    fields: dict[str, Any] = {
        "demand": ids.make_id("demand", n.to_bytes(15, "big")),
        "buyer": key.peer_id,
        "certificate": certificate(key.peer_id, roles=("buyer",)),
        "requirements": NEEDS,
        "lease_s": 60,
        "answers_max": 1,
        "issued_at": now,
        "expires_at": now + 30,
    }
    signed = codec.sign(Demand(**(fields | changes)), key, NETWORK)
    return DemandEvent(key.peer_id, signed.data)


async def test_a_seller_answers_each_demand_once_and_each_buyer_seldom(
    autojump_clock: MockClock, world: World
) -> None:
    tenders = await sell(world, "seller")
    event = demand_event(1)
    assert tenders._consider(event) is not None
    assert tenders._consider(event) is None
    others = [tenders._consider(demand_event(n)) for n in range(2, 12)]
    assert sum(found is not None for found in others) == 4, "a burst of five for each buyer"
    assert tenders._consider(demand_event(20, key_of("another"))) is not None


async def test_a_seller_dials_no_third_party(autojump_clock: MockClock, world: World) -> None:
    tenders = await sell(world, "seller")
    evil = key_of("evil")

    def places(n: int, *ends: str) -> Demand:
        named = tuple(f"{end}/p2p/{evil.peer_id}" for end in ends)
        data = demand_event(n, evil, addresses=named).envelope
        return codec.open_signed(data, Demand, network=NETWORK).message

    victim = "/ip4/203.0.113.9/tcp/22"
    assert await tenders._places(places(1, "/ip4/127.0.0.1/tcp/6379")) == ()
    circuit = f"{victim}/p2p/{key_of('relay').peer_id}/p2p-circuit"
    assert await tenders._places(places(2, circuit)) == ()
    assert await tenders._places(places(3, victim)) == (f"{victim}/p2p/{evil.peer_id}",)
    assert await tenders._places(places(4, victim)) == (), "once a minute"


async def test_a_seller_looks_at_so_many_demands(autojump_clock: MockClock, world: World) -> None:
    tenders = await sell(world, "seller")
    junk = DemandEvent(BUYER.peer_id, b"junk")
    for _ in range(100):
        assert tenders._consider(junk) is None
    assert tenders.counts == {}
    assert tenders._consider(demand_event(1)) is None
    assert tenders.counts == {"busy": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"requirements": structs.replace(NEEDS, tier="vm")},
        {"requirements": structs.replace(NEEDS, resources=Resources(cpu_millis=1001))},
        {"lease_s": 601},
        {"issued_at": 0, "expires_at": 30},
    ],
)
async def test_a_seller_is_silent_where_it_does_not_fit(
    autojump_clock: MockClock, world: World, changes: dict[str, Any]
) -> None:
    tenders = await sell(world, "seller")
    assert tenders._consider(demand_event(1, **changes)) is None


async def test_a_buyer_that_cannot_be_reached_costs_nothing_for_long(
    autojump_clock: MockClock, world: World
) -> None:
    tenders = await sell(world, "seller")
    gone = key_of("gone")
    stranger = await world.join(gone)
    await stranger.publish_demand(demand_event(1, gone).envelope)
    await until(lambda: tenders._answering == 1)
    world.network.kill(stranger)
    await until(lambda: tenders._answering == 0)
    assert tenders.counts == {"answered": 1}
