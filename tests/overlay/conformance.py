"""The contract of `ports.Overlay`, run against every implementation.

A subclass gives a fixture `world` with three hosts: `one` and `two` are connected, `three` is a
late joiner that knows `one`'s address. `kill` ends a host as a power cut would.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
import trio

from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_protocol import envelope
from lumaris_protocol.errors import EnvelopeError, LumarisError, RemoteError
from lumaris_protocol.keys import KeyPair
from tests.overlay.notice_documents import next_notice, revocations
from tests.overlay.shard_maps import needs, regional, shard_map
from tests.overlay.world import (
    COORDINATOR,
    advert,
    certificate,
    demand,
    echo,
    key_of,
    next_of,
    read_all,
    seen_all,
)

PROTOCOL = "/lumaris/test/1"
MIB = 1024 * 1024


@dataclass
class Peer:
    overlay: Overlay
    key: KeyPair


@dataclass
class World:
    one: Peer
    two: Peer
    three: Peer
    addresses: tuple[str, ...]  # of host one
    kill_one: Callable[[], Awaitable[None]]


def world_of(
    overlays: Sequence[Overlay],
    keys: Sequence[KeyPair],
    addresses: tuple[str, ...],
    kill_one: Callable[[], Awaitable[None]],
) -> World:
    one, two, three = (Peer(overlay, key) for overlay, key in zip(overlays, keys, strict=True))
    return World(one, two, three, addresses, kill_one)


class Conformance:
    async def test_peer_id_follows_from_key(self, world: World):
        assert world.one.overlay.peer_id == world.one.key.peer_id
        assert [info.peer for info in await world.two.overlay.peers()] == [world.one.key.peer_id]
        found = await world.one.overlay.reachability()
        assert found.peers == 1
        assert all(a.endswith(f"/p2p/{world.one.key.peer_id}") for a in found.addresses)

    async def test_advert_is_seen_by_publisher_and_peer(self, world: World):
        data = advert(world.one.key)
        async with world.one.overlay.adverts() as own, world.two.overlay.adverts() as events:
            await world.one.overlay.publish_advert(data)
            assert (await next_of(own, world.one.key.peer_id)).envelope == data
            event = await next_of(events, world.one.key.peer_id)
        assert (event.envelope, event.seq) == (data, 1)

    async def test_lower_seq_is_ignored(self, world: World):
        async with world.two.overlay.adverts() as events:
            await world.one.overlay.publish_advert(advert(world.one.key, 5))
            assert (await next_of(events, world.one.key.peer_id)).seq == 5
            await world.one.overlay.publish_advert(advert(world.one.key, 4))
            await world.one.overlay.publish_advert(advert(world.one.key, 6))
            assert (await next_of(events, world.one.key.peer_id)).seq == 6

    async def test_withdrawn_seller_leaves_and_replay_does_not_bring_it_back(self, world: World):
        first = advert(world.one.key, 1)
        async with world.two.overlay.adverts() as events:
            await world.one.overlay.publish_advert(first)
            await next_of(events, world.one.key.peer_id)
            await world.one.overlay.publish_advert(advert(world.one.key, 2, withdrawn=True))
            event = await next_of(events, world.one.key.peer_id)
            assert (event.envelope, event.seq) == (None, 2)
            await world.two.overlay.publish_advert(first)
            await world.one.overlay.publish_advert(advert(world.one.key, 3))
            assert (await next_of(events, world.one.key.peer_id)).seq == 3

    async def test_invalid_advert_is_refused_at_publish(self, world: World):
        with pytest.raises(EnvelopeError) as caught:
            await world.one.overlay.publish_advert(advert(world.one.key, cert=b""))
        assert caught.value.code == "malformed"
        forged = advert(world.one.key, signer=key_of("forger"))
        with pytest.raises(EnvelopeError) as caught:
            await world.one.overlay.publish_advert(forged)
        assert caught.value.code == "wrong_signer"

    async def test_late_joiner_holds_what_was_said_before(self, world: World):
        for number in range(5):
            await world.two.overlay.publish_advert(advert(key_of(f"seller {number}")))
        sellers = {str(key_of(f"seller {number}").peer_id) for number in range(5)}
        async with world.one.overlay.adverts() as events:
            await seen_all(events, sellers)
        async with world.three.overlay.adverts() as events:
            assert await world.three.overlay.connect(world.addresses) == 1
            await seen_all(events, sellers)

    async def test_connect_counts_those_that_answer(self, world: World):
        nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{key_of('nobody').peer_id}"
        assert await world.three.overlay.connect([nobody, "nonsense"]) == 0
        assert await world.three.overlay.connect([nobody, *world.addresses]) == 1

    async def test_echo_both_ways_with_half_close(self, world: World):
        payload = os.urandom(MIB)
        async with world.one.overlay.serve(PROTOCOL, echo):
            stream = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            assert (stream.peer, stream.protocol) == (world.one.key.peer_id, PROTOCOL)

            async def send():
                await stream.send_all(payload)
                await stream.send_eof()

            with trio.fail_after(20):
                async with stream, trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    assert await read_all(stream) == payload

    async def test_handler_knows_the_authenticated_peer(self, world: World):
        seen = []

        async def handler(stream: OverlayStream) -> None:
            seen.append((stream.peer, stream.protocol))

        async with world.one.overlay.serve(PROTOCOL, handler):
            stream = await world.three.overlay.open_stream(
                world.one.key.peer_id, PROTOCOL, addresses=world.addresses
            )
            with trio.fail_after(10):
                async with stream:
                    assert await read_all(stream) == b""
        assert seen == [(world.three.key.peer_id, PROTOCOL)]

    async def test_failing_handler_resets_only_its_stream(self, world: World):
        async def handler(stream: OverlayStream) -> None:
            if await stream.receive_some() == b"fail":
                raise RuntimeError("the handler failed")
            await stream.send_all(b"fine")

        async with world.one.overlay.serve(PROTOCOL, handler):
            good = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            bad = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            await bad.send_all(b"fail")
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await bad.receive_some()
            await bad.aclose()
            await good.send_all(b"go on")
            with trio.fail_after(10):
                assert await read_all(good) == b"fine"
            await good.aclose()

    async def test_unknown_protocol_is_refused(self, world: World):
        with pytest.raises(RemoteError) as caught:
            await world.two.overlay.open_stream(world.one.key.peer_id, "/lumaris/nothing/1")
        assert caught.value.code == "unreachable"

    async def test_serving_ends_with_its_context(self, world: World):
        async with world.one.overlay.serve(PROTOCOL, echo):
            stream = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            await stream.send_all(b"x")
            with trio.fail_after(10):
                assert await stream.receive_some() == b"x"
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()
        with pytest.raises(LumarisError):
            await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)

    async def test_unreachable_peer(self, world: World):
        with pytest.raises(RemoteError) as caught:
            await world.two.overlay.open_stream(key_of("nobody").peer_id, PROTOCOL)
        assert caught.value.code == "unreachable"
        with pytest.raises(RemoteError) as caught:
            await world.two.overlay.open_stream("not a peer id", PROTOCOL)
        assert caught.value.code == "unreachable"

    async def test_reset_breaks_the_peer(self, world: World):
        broken = trio.Event()

        async def handler(stream: OverlayStream) -> None:
            await stream.send_all(b"hello")
            try:
                await stream.receive_some()
            except trio.BrokenResourceError:
                broken.set()

        async with world.one.overlay.serve(PROTOCOL, handler):
            stream = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            with trio.fail_after(10):
                assert await stream.receive_some() == b"hello"
                await stream.reset()
                await broken.wait()

    async def test_stream_to_killed_peer_breaks(self, world: World):
        async with world.one.overlay.serve(PROTOCOL, echo):
            stream = await world.two.overlay.open_stream(world.one.key.peer_id, PROTOCOL)
            await stream.send_all(b"x")
            with trio.fail_after(10):
                assert await stream.receive_some() == b"x"
                await world.kill_one()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            await stream.aclose()

    async def test_own_certificate_is_presented_and_renewed(self, world: World):
        one = world.one
        await one.overlay.present(certificate(one.key.peer_id))
        await one.overlay.present(certificate(one.key.peer_id, lifetime_s=7200))
        for wrong in (
            b"junk",
            certificate(world.two.key.peer_id),
            certificate(one.key.peer_id, signer=one.key),
            certificate(one.key.peer_id, now=1_000_000),
        ):
            with pytest.raises(EnvelopeError):
                await one.overlay.present(wrong)

    async def test_find_peer_gives_the_newest_record(self, world: World):
        one, two = world.one, world.two
        await one.overlay.present(certificate(one.key.peer_id))
        found = None
        with trio.fail_after(30):
            while found is None:
                found = await two.overlay.find_peer(one.key.peer_id)
                await trio.sleep(0.01)
        assert envelope.decode(found).payload_type == "endpoint"
        # Later than the endpoint, which was issued in this very second.
        now = time.time()
        for seq in (1, 2):
            await one.overlay.publish_advert(advert(one.key, seq, now=now + 5 + seq))
        newest = advert(one.key, 2, now=now + 7)
        with trio.fail_after(30):
            while await two.overlay.find_peer(one.key.peer_id) != newest:
                await trio.sleep(0.01)
        for nobody in (key_of("nobody").peer_id, "not a peer id", "x" * 200):
            assert await two.overlay.find_peer(nobody) is None

    async def test_ping_tells_round_trip_and_clock(self, world: World):
        one, three = world.one, world.three
        found = await world.two.overlay.ping(one.key.peer_id)
        assert 0 <= found.round_trip_s < 5
        assert abs(found.clock_offset_s) < 5
        assert not found.relayed
        await three.overlay.ping(one.key.peer_id, addresses=world.addresses)
        assert one.key.peer_id in [info.peer for info in await three.overlay.peers()]
        for nobody in (key_of("nobody").peer_id, "not a peer id", "x" * 200):
            with pytest.raises(RemoteError) as caught:
                await world.two.overlay.ping(nobody)
            assert caught.value.code == "unreachable"

    async def test_demand_reaches_others_and_not_its_buyer(self, world: World):
        one, two = world.one, world.two
        async with one.overlay.demands() as own, two.overlay.demands() as events:
            sent: list[bytes] = []
            event = None
            with trio.fail_after(20):
                while event is None:
                    # A young connection may be gossiped over only after a heartbeat.
                    sent.append(demand(one.key, len(sent)))
                    await one.overlay.publish_demand(sent[-1])
                    with trio.move_on_after(1):
                        event = await events.receive()
            assert event.buyer == one.key.peer_id
            assert event.envelope in sent
            assert own.statistics().current_buffer_used == 0

    async def test_invalid_demand_is_refused_at_publish(self, world: World):
        for wrong in (
            b"junk",
            demand(world.one.key, signer=key_of("forger")),
            demand(world.one.key, cert=b""),
            demand(world.one.key, now=1_000_000),
        ):
            with pytest.raises(EnvelopeError):
                await world.one.overlay.publish_demand(wrong)

    async def test_a_shard_map_is_taken_and_never_taken_back(self, world: World):
        for peer in (world.one, world.two):
            await peer.overlay.present_shards(shard_map(("local",), version=2))
        for wrong, code in (
            (shard_map(version=1), "map_stale"),
            (shard_map(("elsewhere",), version=2), "map_stale"),
            (shard_map(version=3, signer=key_of("liar")), "not_certified"),
            (shard_map(version=3, now=1_000_000), "expired"),
            (shard_map(("x",), ("x",), version=3), "map_invalid"),
            (b"junk", "malformed"),
            (bytes(20_000), "oversize"),
        ):
            with pytest.raises(EnvelopeError) as caught:
                await world.one.overlay.present_shards(wrong)
            assert caught.value.code == code

    async def test_sellers_of_sought_shards_are_found(self, world: World):
        one, two = world.one, world.two
        for peer in (one, two):
            await peer.overlay.present_shards(shard_map(("here",), ("there",)))
        async with two.overlay.adverts() as events:
            await one.overlay.publish_advert(regional(one.key, "here"))
            with trio.fail_after(20):
                found = None
                while found is None:
                    await two.overlay.seek(needs("here"))
                    with trio.move_on_after(1):
                        found = await next_of(events, one.key.peer_id)
            assert found.seq == 1
            await one.overlay.publish_advert(regional(one.key, "here", 2))
            assert (await next_of(events, one.key.peer_id)).seq == 2

    async def test_notice_reaches_the_publisher_and_its_peers(self, world: World):
        data = revocations(key_of("somebody").peer_id, seq=3)
        async with world.one.overlay.notices() as own, world.two.overlay.notices() as notices:
            await world.one.overlay.publish_notice(data)
            await next_notice(own, data)
            notice = await next_notice(notices, data)
        assert (notice.kind, notice.seq, notice.signer) == (
            "revocations",
            3,
            COORDINATOR.peer_id,
        )
        async with world.two.overlay.notices() as again:
            await next_notice(again, data)

    async def test_late_joiner_is_told_of_earlier_notices(self, world: World):
        data = revocations(key_of("somebody").peer_id)
        await world.one.overlay.publish_notice(data)
        async with world.three.overlay.notices() as notices:
            assert await world.three.overlay.connect(world.addresses) == 1
            await next_notice(notices, data)

    async def test_invalid_notice_is_refused_at_publish(self, world: World):
        for data, code in (
            (revocations(signer=key_of("forger")), "wrong_signer"),
            (revocations(now=1_000_000), "expired"),
            (advert(world.one.key), "wrong_type"),
            (b"x" * 30_000, "oversize"),
        ):
            with pytest.raises(EnvelopeError) as caught:
                await world.one.overlay.publish_notice(data)
            assert caught.value.code == code

    async def test_revoked_peer_is_refused_and_its_advert_leaves(self, world: World):
        seller = world.two.key.peer_id
        async with world.one.overlay.adverts() as events:
            await world.two.overlay.publish_advert(advert(world.two.key))
            assert (await next_of(events, seller)).envelope is not None
            # Dated ahead of the certificate that the test's hosts were made with.
            await world.one.overlay.publish_notice(revocations(seller, at=time.time() + 60))
            assert (await next_of(events, seller)).envelope is None
        with trio.fail_after(10):
            while await world.one.overlay.peers():
                await trio.sleep(0.02)
        assert await world.one.overlay.find_peer(seller) is None
        with pytest.raises(RemoteError) as caught:
            await world.two.overlay.open_stream(
                world.one.key.peer_id, PROTOCOL, addresses=world.addresses
            )
        assert caught.value.code == "unreachable"
        assert await world.three.overlay.connect(world.addresses) == 1
