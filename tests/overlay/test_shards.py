"""Shards on one host and among many: joining, leaving, asking, and changes of the map."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lumaris_overlay.advert_filter import facts_of, filter_of, passes
from lumaris_overlay.directory import Directory
from lumaris_overlay.libp2p.gossip import ADVERTS
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_overlay.shard_desk import FOLLOW_IDLE_S, ShardDesk
from lumaris_overlay.simulated import open_network
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol import codec, matching
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import SHARDS_FOLLOWED_MAX
from lumaris_protocol.messages.advert import Advert, Resources, Runtime
from lumaris_protocol.shards import OVERLAP_S
from tests.overlay.hosts import member
from tests.overlay.shard_maps import GPUS, needs, regional, shard_map
from tests.overlay.world import COORDINATOR, KEYS, NETWORK, key_of, next_of, until

NOW = 1_000_000.0
REGIONS = tuple(f"r{number}" for number in range(1, 9))
EACH = tuple((region,) for region in REGIONS)


def holds_seq(host: Libp2pOverlay, seq: int) -> bool:
    return opened(host.directory.snapshot()[0]).seq == seq


def opened(data: bytes) -> Advert:
    return codec.open_signed(data, Advert, network=NETWORK).message


class TestDesk:
    def desk(self, file: Path | None = None) -> ShardDesk:
        return ShardDesk(NETWORK, KEYS, file)

    def test_an_undivided_market_is_one_shard(self) -> None:
        desk = self.desk()
        assert desk.joined(NOW) == (0,)
        assert desk.seek(needs("r1"), NOW).followed == (0,)
        assert not desk.divided(NOW)

    def test_a_seller_is_in_its_shard_and_a_buyer_where_it_looks(self) -> None:
        desk = self.desk()
        assert desk.adopt(shard_map(*EACH, now=NOW), NOW)
        assert desk.joined(NOW) == ()
        desk.sell(opened(regional(key_of("one"), "r3", now=NOW)))
        assert desk.joined(NOW) == (3,)
        sought = desk.seek(needs("r1", "r3"), NOW)
        assert (sought.followed, sought.asked) == ((1, 3), ())
        assert set(desk.joined(NOW)) == {1, 3}
        assert desk.joined(NOW + FOLLOW_IDLE_S) == (3,)

    def test_beyond_a_few_shards_the_rest_is_asked_for(self) -> None:
        desk = self.desk()
        desk.adopt(shard_map(*EACH, now=NOW), NOW)
        sought = desk.seek(needs(*REGIONS), NOW)
        assert len(sought.followed) == SHARDS_FOLLOWED_MAX
        assert len(sought.followed) + len(sought.asked) == len(REGIONS)
        # What is followed stays, until nobody has wanted it for a while.
        again = desk.seek(needs("r8"), NOW + 1)
        assert again.asked == (8,)
        later = NOW + FOLLOW_IDLE_S
        assert desk.seek(needs("r8"), later).followed == (8,)
        assert desk.joined(later) == (8,)

    def test_buyers_of_one_place_are_one(self) -> None:
        desk = self.desk()
        desk.adopt(shard_map(*EACH, now=NOW), NOW)
        for number in range(100):
            wanted = structs.replace(
                needs("r1"), rate_nanos_max=number, resources=Resources(cpu_millis=number)
            )
            assert desk.seek(wanted, NOW + number / 100).followed == (1,)
        desk.seek(needs("r2"), NOW)
        assert desk.joined(NOW) == (1, 2)

    def test_a_new_map_is_followed_with_the_old_one_for_a_refresh(self) -> None:
        desk = self.desk()
        advert = opened(regional(key_of("one"), "r1", now=NOW))
        desk.sell(advert)
        desk.seek(needs("r2"), NOW)
        assert desk.adopt(shard_map(*EACH, now=NOW), NOW)
        assert desk.published_in(advert, NOW) == (1, 0)
        assert set(desk.joined(NOW)) == {0, 1, 2}
        after = NOW + OVERLAP_S
        assert desk.published_in(advert, after) == (1,)
        desk.seek(needs("r2"), after)
        assert desk.joined(after) == (1, 2)

    def test_a_map_signed_again_changes_nothing(self) -> None:
        desk = self.desk()
        desk.sell(opened(regional(key_of("one"), "r1", now=NOW)))
        desk.adopt(shard_map(*EACH, now=NOW), NOW)
        assert not desk.adopt(shard_map(*EACH, now=NOW + 9), NOW + 9)
        assert set(desk.joined(NOW + OVERLAP_S - 1)) == {0, 1}

    def test_the_map_is_kept_over_a_restart_and_junk_is_not(self, tmp_path: Path) -> None:
        file = tmp_path / "shards"
        self.desk(file).adopt(shard_map(*EACH, version=3, now=NOW), NOW)
        assert self.desk(file).version == 3
        with pytest.raises(EnvelopeError, match="map_stale"):
            self.desk(file).adopt(shard_map(*EACH, version=2, now=NOW), NOW)
        for junk in (b"", b"junk", bytes(100_000), shard_map(signer=key_of("liar"))):
            file.write_bytes(junk)
            assert self.desk(file).version == 0

    def test_a_disk_that_takes_nothing_stops_nothing(self, tmp_path: Path) -> None:
        desk = self.desk(tmp_path / "nowhere" / "shards")
        assert desk.adopt(shard_map(*EACH, now=NOW), NOW)
        assert desk.version == 1


@given(
    st.sampled_from(["r1", "r2"]),
    st.lists(st.sampled_from(["r1", "r2"]), max_size=2, unique=True),
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["wasm", "container"]),
)
def test_a_filter_never_leaves_out_what_fits(
    region: str, regions: list[str], free: int, wanted: int, has: bool, wants: bool, tier: Any
) -> None:
    base = opened(regional(key_of("one"), region, now=NOW))
    offered = Resources(cpu_millis=free, memory_bytes=free, gpus=GPUS if has else ())
    advert = structs.replace(
        base, free=offered, runtimes=(Runtime(tier=tier, version="1", assurance="x"),)
    )
    asked = structs.replace(
        needs(*regions),
        resources=Resources(cpu_millis=wanted, memory_bytes=wanted, gpus=GPUS if wants else ()),
    )
    if not matching.explain(asked, advert, lease_s=1):
        assert passes(filter_of(asked), facts_of(advert))


def test_a_filtered_page_goes_on_where_it_stopped() -> None:
    directory = Directory(AdvertGate(NETWORK, KEYS))
    keys = [key_of(f"seller {number}") for number in range(30)]
    for number, key in enumerate(keys):
        directory.offer(regional(key, f"r{number % 3}", now=NOW), NOW)
    found: list[bytes] = []
    after = ""
    for _ in range(30):
        page, after = directory.page(after, 4, lambda facts: facts.region == "r1")
        found += page
        if not after:
            break
    assert len(found) == len(set(found)) == 10
    assert {opened(data).region for data in found} == {"r1"}
    assert directory.page("", 0) == ([], "")


async def test_simulated_sellers_spread_only_in_their_shard() -> None:
    async with open_network(NETWORK, KEYS, now=lambda: NOW) as network:
        data = shard_map(*EACH, now=NOW)
        sellers = {f"{r}/{n}": network.host(key_of(f"{r}/{n}")) for r in REGIONS for n in range(3)}
        for name, host in sellers.items():
            await host.present_shards(data)
            await host.publish_advert(regional(key_of(name), name[:2], now=NOW))
        for name, host in sellers.items():
            held = {opened(document).region for document in host.documents()}
            assert held == {name[:2]}
            assert len(host.documents()) == 3
        buyer = network.host(key_of("buyer"))
        await buyer.present_shards(data)
        await buyer.seek(needs("r1", "r2"))
        assert len(buyer.documents()) == 6
        await buyer.seek(needs(*REGIONS))
        assert len(buyer.documents()) == 3 * len(REGIONS)
        # A shard that is followed tells of newcomers; one that was asked does not.
        late = network.host(key_of("late"))
        await late.present_shards(data)
        async with buyer.adverts() as events:
            await late.publish_advert(regional(key_of("late"), "r1", now=NOW))
            await next_of(events, late.peer_id)


async def test_nobody_disappears_while_the_simulated_map_changes() -> None:
    clock = [NOW]
    async with open_network(NETWORK, KEYS, now=lambda: clock[0]) as network:
        seller, old, new = (network.host(key_of(name)) for name in ("seller", "old", "new"))
        await seller.connect([old.address])
        await seller.publish_advert(regional(key_of("seller"), "r1", now=NOW))
        await old.seek(needs("r1"))
        data = shard_map(*EACH, now=NOW)
        await seller.present_shards(data)
        await new.present_shards(data)
        await new.seek(needs("r1"))
        assert len(new.documents()) == 1
        clock[0] += 60
        await seller.publish_advert(regional(key_of("seller"), "r1", 2, now=clock[0]))
        assert {opened(document).seq for host in (old, new) for document in host.documents()} == {2}
        await old.present_shards(data)
        clock[0] += OVERLAP_S
        for host in (old, new):
            await host.seek(needs("r1"))
        await network.tick()
        assert seller.shards == {1}
        await seller.publish_advert(regional(key_of("seller"), "r1", 3, now=clock[0]))
        assert {opened(document).seq for host in (old, new) for document in host.documents()} == {3}


# --- real hosts ---


@asynccontextmanager
async def real_hosts(*names: str, **settings: Any) -> AsyncIterator[list[Libp2pOverlay]]:
    """Hosts of which each knows the first."""
    async with AsyncExitStack() as stack:
        hosts: list[Libp2pOverlay] = []
        for name in names:
            hosts.append(await stack.enter_async_context(open_host(member(who=key_of(name)))))
            if len(hosts) > 1:
                assert await hosts[-1].connect((await hosts[0].reachability()).addresses) == 1
        yield hosts


def regions_of(host: Libp2pOverlay) -> set[str]:
    return {opened(data).region for data in host.directory.snapshot()}


@pytest.mark.slow
async def test_real_hosts_join_the_shards_they_need() -> None:
    async with real_hosts("hub", "east", "west", "buyer") as (hub, east, west, buyer):
        data = shard_map(*EACH)
        for host in (hub, east, west, buyer):
            await host.present_shards(data)
        await east.publish_advert(regional(key_of("east"), "r1"))
        await west.publish_advert(regional(key_of("west"), "r2"))
        await buyer.connect((await east.reachability()).addresses)
        await buyer.connect((await west.reachability()).addresses)
        await until(lambda: buyer.exchange.gossip.followers(ADVERTS, 1))
        await buyer.seek(needs("r1"))
        await until(lambda: "r1" in regions_of(buyer))
        assert set(east.exchange.gossip.topics()) == {
            f"/lumaris/{NETWORK}/{kind}/1" for kind in ("adverts", "demands", "notices")
        }
        await until(lambda: buyer.exchange.gossip.in_mesh(east.host.get_id(), ADVERTS, 1))
        async with buyer.adverts() as events:
            await east.publish_advert(regional(key_of("east"), "r1", 2))
            while (await next_of(events, east.peer_id)).seq != 2:
                pass
        assert buyer.shards.desk.joined(0.0) == (1,)


@pytest.mark.slow
async def test_a_real_buyer_finds_a_shard_whose_members_it_does_not_know() -> None:
    async with real_hosts("hub", "east", "buyer") as (hub, east, buyer):
        data = shard_map(*EACH)
        for host in (hub, east, buyer):
            await host.present_shards(data)
        await east.publish_advert(regional(key_of("east"), "r1"))
        assert east.peer_id not in {info.peer for info in await buyer.peers()}
        with trio.fail_after(30):
            while "r1" not in regions_of(buyer):
                await buyer.seek(needs("r1"))
                await trio.sleep(0.05)
        await until(lambda: buyer.exchange.gossip.followers(ADVERTS, 1))


@pytest.mark.slow
async def test_a_real_index_peer_is_asked_with_a_filter() -> None:
    async with real_hosts("crowd", "hub") as (crowd, hub):
        for number, region in enumerate(REGIONS):
            await crowd.publish_advert(regional(key_of(f"seller {number}"), region))
        await until(lambda: len(hub.directory) == len(REGIONS))
        data = shard_map(*EACH)
        # It was everywhere before the market was divided, and stays for a while.
        await hub.seek(needs())
        await hub.present_shards(data)
        async with open_host(member(who=key_of("late"))) as late:
            await late.present_shards(data)
            await late.connect((await hub.reachability()).addresses)
            await until(lambda: len(late.exchange.gossip.followers(ADVERTS, 1)) == 1)
            assert len(late.directory) == 0
            await late.shards._exchange.pull(hub.host.get_id(), (3, 4), filter_of(needs("r4")))
            assert regions_of(late) == {"r4"}
            await late.seek(needs(*REGIONS))
            await until(lambda: regions_of(late) == set(REGIONS))
            assert len(late.shards.desk.joined(0.0)) == SHARDS_FOLLOWED_MAX


@pytest.mark.slow
async def test_an_advert_in_the_wrong_topic_is_refused_and_the_forwarder_stays() -> None:
    async with real_hosts("hub", "liar") as (hub, liar):
        data = shard_map(*EACH)
        for host in (hub, liar):
            await host.present_shards(data)
            await host.seek(needs("r1"))
        await until(lambda: hub.exchange.gossip.in_mesh(liar.host.get_id(), ADVERTS, 1))
        await until(lambda: liar.exchange.gossip.in_mesh(hub.host.get_id(), ADVERTS, 1))
        wrong, right = regional(key_of("s"), "r2"), regional(key_of("t"), "r1")
        await liar.exchange.gossip.publish(ADVERTS, wrong, 1)
        await liar.exchange.gossip.publish(ADVERTS, right, 1)
        await until(lambda: hub.directory.holds(right))
        assert not hub.directory.holds(wrong)
        assert [info.peer for info in await hub.peers()] == [liar.peer_id]


@pytest.mark.slow
async def test_nobody_disappears_while_the_real_map_changes() -> None:
    async with real_hosts("seller", "old", "new") as (seller, old, new):
        await seller.publish_advert(regional(key_of("seller"), "r1"))
        await until(lambda: regions_of(old) == regions_of(new) == {"r1"})
        await old.seek(needs("r1"))
        await new.seek(needs("r1"))
        for host in (seller, new):
            await host.present_shards(shard_map(*EACH))
        await seller.publish_advert(regional(key_of("seller"), "r1", 2))
        for host in (old, new):
            await until(partial(len, host.directory))
            await until(partial(holds_seq, host, 2), timeout_s=20)
        assert set(seller.shards.desk.joined(0.0)) == {0, 1}


@pytest.mark.parametrize("wrong", [b"junk", shard_map(signer=key_of("liar")), bytes(10_000)])
async def test_a_bad_map_is_refused_by_a_simulated_host(wrong: bytes) -> None:
    async with open_network(NETWORK, KEYS) as network:
        host = network.host(COORDINATOR)
        with pytest.raises(EnvelopeError):
            await host.present_shards(wrong)
        assert host.shards == {0}
