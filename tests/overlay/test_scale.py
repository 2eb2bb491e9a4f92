"""Many hosts: ten thousand simulated sellers in shards, and a dozen real hosts in one process."""

from __future__ import annotations

import gc
import itertools
import os
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio

from lumaris_overlay.libp2p import connections
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_overlay.libp2p.overrides import WakingEvents
from lumaris_overlay.simulated import SimulatedOverlay, open_network
from lumaris_protocol import limits
from lumaris_protocol.limits import SHARDS_FOLLOWED_MAX
from tests.overlay.hosts import member
from tests.overlay.shard_maps import needs, regional, shard_map
from tests.overlay.world import (
    KEYS,
    NETWORK,
    echo,
    key_of,
    next_of,
    open_when_ready,
    read_all,
    until,
)

NOW = 1_000_000.0
PROTOCOL = "/lumaris/test/1"


@pytest.mark.parametrize(
    ("sellers", "shards"),
    [(100, 10), pytest.param(10_000, 60, marks=pytest.mark.slow)],
)
async def test_simulated_sellers_are_found_in_their_shards(sellers: int, shards: int) -> None:
    regions = [f"r{number}" for number in range(shards)]
    data = shard_map(*((region,) for region in regions), now=NOW)
    async with open_network(NETWORK, KEYS, now=lambda: NOW) as network:
        hosts: list[SimulatedOverlay] = []
        for number in range(sellers):
            key = key_of(f"seller {number}")
            host = network.host(key)
            await host.present_shards(data)
            await host.publish_advert(regional(key, regions[number % shards], now=NOW))
            hosts.append(host)
        in_shard = [len(hosts[number::shards]) for number in range(shards)]
        # Each seller hears of its own shard, all of it and nothing else.
        for number in (0, 1, sellers // 2, sellers - 1):
            assert len(hosts[number].documents()) == in_shard[number % shards]
        buyer = network.host(key_of("buyer"))
        await buyer.present_shards(data)
        await buyer.seek(needs("r1"))
        assert len(buyer.documents()) == in_shard[1]
        await buyer.seek(needs(*regions[:8]))
        assert len(buyer.documents()) == sum(in_shard[:8])
        assert len(buyer.shards) == SHARDS_FOLLOWED_MAX
        # A change is heard by those who follow the shard, however long the way.
        async with buyer.adverts() as events:
            await hosts[1].publish_advert(regional(key_of("seller 1"), "r1", 2, now=NOW))
            while (await next_of(events, hosts[1].peer_id)).seq != 2:
                pass
        holders = sum(host.documents_of(hosts[1].peer_id) != [] for host in hosts)
        assert holders == in_shard[1]


async def test_an_undivided_market_is_no_deeper_than_its_queue() -> None:
    # A chain as long as the market: passing on must not be a call inside a call.
    async with open_network(NETWORK, KEYS, now=lambda: NOW) as network:
        hosts = [network.host(key_of(f"link {number}")) for number in range(1_500)]
        for one, other in itertools.pairwise(hosts):
            await one.connect([other.address])
        await hosts[0].publish_advert(regional(key_of("link 0"), "r1", now=NOW))
        assert len(hosts[-1].documents()) == 1


@pytest.mark.slow
async def test_a_dozen_real_hosts_hear_of_each_other() -> None:
    async with AsyncExitStack() as stack:
        hosts: list[Libp2pOverlay] = []
        for number in range(12):
            config = member(who=f"dozen {number}")
            host = await stack.enter_async_context(open_host(config))
            for earlier in hosts[:: max(1, len(hosts) // 3)][:3]:
                await host.connect((await earlier.reachability()).addresses)
            hosts.append(host)
        for number, host in enumerate(hosts):
            await host.publish_advert(regional(key_of(f"dozen {number}"), "r1"))
        for host in hosts:
            await until(partial(knows_all, host, len(hosts)), timeout_s=30)


def knows_all(host: Libp2pOverlay, count: int) -> bool:
    return len(host.directory) == count


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tasks_now() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def test_no_reader_waits_for_an_event_that_was_let_go_of() -> None:
    held = {number: trio.Event() for number in range(4)}
    events = WakingEvents(held)
    events.pop(0)
    assert events.pop(9, None) is None
    del events[1]
    events.clear()
    assert all(event.is_set() for event in held.values())
    assert not events


@pytest.mark.slow
async def test_connects_and_streams_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of `benchmarks/soak.py`."""
    # A member that comes again and again is refused for a while: here it always may.
    for name in ("NEWCOMERS_BURST_PER_IP", "NEWCOMERS_BURST_PER_SITE", "RETURNS_BURST_PER_PEER"):
        monkeypatch.setattr(limits, name, 10_000)
    # Nobody comes back by itself, so that both looks are at hosts without connections.
    monkeypatch.setattr(connections, "_PEERS_WANTED", 0)
    async with open_host(member(who="soaked")) as host, open_host(member(who="guest")) as guest:
        address = (await host.reachability()).addresses
        counts: list[tuple[int, int]] = []
        async with host.serve(PROTOCOL, echo):
            for number in range(100):
                # Both sides may dial at once, and each refuse the other's connection.
                with trio.fail_after(10):
                    while await guest.connect(address) != 1:
                        await trio.sleep(0.02)
                for _ in range(5):
                    # The end of the last connection may be told after the next one's beginning.
                    stream = await open_when_ready(guest, host.peer_id, PROTOCOL)
                    await stream.send_all(b"x")
                    await stream.send_eof()
                    with trio.fail_after(10):
                        assert await read_all(stream) == b"x"
                    await stream.aclose()
                for one, other in ((guest, host), (host, guest)):
                    await one.connections.drop(other.host.get_id())
                if number in (19, 99):
                    counts.append(await at_rest())
        (tasks_before, files_before), (tasks_after, files_after) = counts
        assert tasks_after - tasks_before <= 5
        assert files_after - files_before <= 5


async def at_rest() -> tuple[int, int]:
    """Tasks and descriptors, once two looks in a row agree."""
    before = (-1, -1)
    with trio.move_on_after(10):
        while True:
            gc.collect()
            now = (tasks_now(), open_descriptors())
            if now == before:
                return now
            before = now
            await trio.sleep(0.25)
    return before
