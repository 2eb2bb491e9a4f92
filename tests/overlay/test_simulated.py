"""The simulated network keeps the contract."""

from __future__ import annotations

import pytest

from lumaris_overlay.simulated import open_network
from tests.overlay.conformance import Conformance, world_of
from tests.overlay.world import KEYS, NETWORK, advert, key_of, next_of


@pytest.fixture
async def world():
    keys = [key_of(name) for name in ("one", "two", "three")]
    async with open_network(NETWORK, KEYS) as network:
        hosts = [network.host(key) for key in keys]
        await hosts[1].connect([hosts[0].address])

        async def kill() -> None:
            network.kill(hosts[0])

        yield world_of(hosts, keys, (hosts[0].address,), kill)


class TestSimulated(Conformance):
    pass


async def test_expiry_is_told():
    clock = [1_000_000.0]
    key = key_of("one")
    async with open_network(NETWORK, KEYS, now=lambda: clock[0]) as network:
        host = network.host(key)
        async with host.adverts() as events:
            await host.publish_advert(advert(key, now=clock[0], lifetime_s=100))
            assert (await next_of(events, key.peer_id)).envelope is not None
            clock[0] += 161
            await network.tick()
            assert (await next_of(events, key.peer_id)).envelope is None


async def test_adverts_travel_through_others_and_not_through_a_cut():
    a, b, c = (key_of(name) for name in "abc")
    async with open_network(NETWORK, KEYS) as network:
        hosts = [network.host(key) for key in (a, b, c)]
        await hosts[0].connect([hosts[1].address])
        await hosts[1].connect([hosts[2].address])
        async with hosts[2].adverts() as events:
            await hosts[0].publish_advert(advert(a))
            await next_of(events, a.peer_id)
            network.cut(hosts[0], hosts[1])
            await hosts[0].publish_advert(advert(a, 2))
            await hosts[0].connect([hosts[1].address])
            assert (await next_of(events, a.peer_id)).seq == 2
