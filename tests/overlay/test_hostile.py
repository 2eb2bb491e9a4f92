"""What peers may do to a real host: it lives, believes nothing, forgets nothing, stays quick.

The attackers are certified: whoever is not gets no further than `test_admission.py` shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import msgspec
import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed

from lumaris_overlay.libp2p import admission as admission_module
from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.gossip import ADVERTS
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_protocol import frames
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    ADVERTS_BURST_PER_SELLER,
    BAD_ADVERTS_BURST_PER_PEER,
    HANDSHAKES_MAX,
    OVERLAY_CONNECTIONS_MAX,
)
from lumaris_protocol.protocols import HELLO
from tests.overlay.hosts import member
from tests.overlay.test_admission import uncertified
from tests.overlay.test_canaries import SENDER, TOPIC, gossip_message, works
from tests.overlay.world import advert, certificate, echo, key_of, next_of, read_all, until

pytestmark = pytest.mark.slow

STRANGER = key_of("stranger")
# An attack that starves the honest makes them wait for seconds; a busy machine for tenths.
PATIENCE_S = 20.0


def forgeries() -> list[bytes]:
    now = time.time()
    return [
        b"",
        os.urandom(300),
        advert(STRANGER)[:-3],
        advert(STRANGER, signer=key_of("forger")),
        advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER)),
        advert(STRANGER, cert=certificate(key_of("x").peer_id)),
        advert(STRANGER, now=now - 3000),
        advert(STRANGER, now=now + 300, cert=certificate(STRANGER.peer_id)),
        advert(STRANGER, network="other"),
        advert(STRANGER) + b"x" * 4000,
    ]


@pytest.fixture
async def pair():
    """An honest host, and one that says what it is told to."""
    async with open_host(member("one")) as honest, open_host(member(STRANGER)) as stranger:
        assert await stranger.connect((await honest.reachability()).addresses) == 1
        yield honest, stranger


@pytest.fixture
async def trio_of(pair):
    """The pair, and another honest host that is connected to the honest one alone."""
    honest, stranger = pair
    async with open_host(member("friend")) as friend:
        assert await friend.connect((await honest.reachability()).addresses) == 1
        await until(lambda: friend.exchange.gossip.in_mesh(honest.host.get_id()))
        yield honest, stranger, friend


async def latency_s(asker: Libp2pOverlay, asked: Libp2pOverlay, times: int = 5) -> float:
    """The middle of some round trips over a new stream each; a test protocol of no limit."""
    found = []
    for _ in range(times):
        with trio.fail_after(PATIENCE_S):
            began = trio.current_time()
            stream = await asker.open_stream(asked.peer_id, "/still/1")
            async with stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
            found.append(trio.current_time() - began)
    return sorted(found)[times // 2]


async def attacked(
    friend: Libp2pOverlay, honest: Libp2pOverlay, attack: Callable[[], Awaitable[None]]
) -> None:
    """Run the attack; the honest go on answering each other meanwhile and afterwards."""
    async with honest.serve("/still/1", echo), trio.open_nursery() as nursery:
        before_s = await latency_s(friend, honest)
        nursery.start_soon(attack)
        during_s = await latency_s(friend, honest)
        nursery.cancel_scope.cancel()
    print(f"latency before={before_s * 1000:.1f}ms during={during_s / before_s:.1f}x")


async def raw_stream(attacker: Libp2pOverlay, honest: Libp2pOverlay, protocol: str):
    """A stream without any of our own manners."""
    return await attacker.host.new_stream(honest.host.get_id(), [protocol])


def rpc_bytes(**fields: object) -> bytes:
    return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())  # type: ignore[arg-type]


async def test_random_bytes_on_the_port(pair):
    honest, stranger = pair
    port = int((await honest.reachability()).addresses[0].split("/")[4])
    for data in (b"", os.urandom(2000), b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(500)):
        async with await trio.open_tcp_stream("127.0.0.1", port) as raw:
            with trio.move_on_after(0.2), suppress(trio.BrokenResourceError):
                await raw.send_all(data)
                await raw.send_eof()
                while await raw.receive_some():
                    pass
    await works(honest, stranger)


@pytest.mark.parametrize("number", range(10))
async def test_forged_advert_over_gossip(pair, number):
    honest, stranger = pair
    await until(lambda: stranger.exchange.gossip.in_mesh(honest.host.get_id()))
    await stranger.exchange.gossip.publish(ADVERTS, forgeries()[number])
    async with honest.adverts() as events:
        good = advert(key_of("good seller"))
        await stranger.publish_advert(good)
        assert (await next_of(events, key_of("good seller").peer_id)).envelope == good
    assert len(honest.directory) == 1


@pytest.mark.parametrize("number", range(9))
async def test_forged_advert_over_the_index(pair, number):
    honest, stranger = pair
    stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
    query = index.Query(count=10)
    async with stream:
        await index.exchange(stream, query, [forgeries()[number]], lambda data: None)
    assert len(honest.directory) == 0
    await works(honest, stranger)


HEADER = frames.encode(Kind.HEADER, msgspec.json.encode(index.Query(count=1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff\x01",
        frames.encode(Kind.HEADER, b"{}")[:-1],
        frames.encode(Kind.HEADER, b'{"count":100000000}'),
        frames.encode(Kind.HEADER, b'{"count":-1}'),
        frames.encode(Kind.HEADER, b"[" * 3000),
        frames.encode(Kind.DATA, b"x"),
        HEADER + frames.encode(Kind.ENVELOPE, b"x" * 3000),
        HEADER + frames.encode(Kind.ENVELOPE, b"x") * (index.PUSHED_MAX + 1),
        HEADER + frames.encode(Kind.HEADER, b"{}"),
    ],
    ids=range(11),
)
async def test_bad_index_frames(pair, data):
    honest, stranger = pair
    stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
    with trio.fail_after(10):
        await stream.send_all(data)
        await stream.send_eof()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(stream)
    await stream.aclose()
    await works(honest, stranger)


async def test_peer_that_keeps_sending_forgeries_is_disconnected(pair):
    honest, stranger = pair
    bad = advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER))
    for _ in range(BAD_ADVERTS_BURST_PER_PEER + 5):
        honest.exchange._take(stranger.peer_id, bad)
    await until(lambda: not honest.connections.live())
    assert honest.conduct.banned(stranger.peer_id)


async def test_lying_index_server_gives_a_joiner_nothing():
    liar_config, joiner_config = member(STRANGER), member("joiner")
    asked = trio.Event()
    async with open_host(liar_config) as liar, open_host(joiner_config) as joiner:

        async def lie(stream):
            out = frames.encode(Kind.HEADER, b"{}")
            out += b"".join(frames.encode(Kind.ENVELOPE, data) for data in forgeries()[:-1])
            await stream.send_all(out + frames.encode(Kind.END))
            asked.set()

        liar.host.remove_stream_handler(index.PROTOCOL)
        async with liar.serve(index.PROTOCOL, lie):
            await joiner.connect((await liar.reachability()).addresses)
            with trio.fail_after(10):
                await asked.wait()
        await works(liar, joiner)
        assert len(joiner.directory) == 0


async def test_late_joiner_gets_a_thousand_adverts():
    now = time.time()
    async with open_host(member("one")) as full, open_host(member("two")) as joiner:
        for number in range(1000):
            full.directory.offer(advert(key_of(f"seller {number}")), now)
        await joiner.connect((await full.reachability()).addresses)
        await until(lambda: len(joiner.directory) == 1000)


async def test_index_answers_one_peer_only_so_often(pair):
    honest, stranger = pair
    answered = 0
    try:
        while answered < 100:
            stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
            async with stream:
                await index.exchange(stream, index.Query(count=1), [], lambda data: None)
            answered += 1
    except trio.BrokenResourceError:
        pass
    assert 0 < answered < 60


async def test_advert_flood_is_passed_on_only_so_fast(trio_of):
    """Ten times what a seller may say: neighbours of neighbours get the allowed rate."""
    honest, stranger, friend = trio_of
    await until(lambda: stranger.exchange.gossip.in_mesh(honest.host.get_id()))
    said, heard = 0, 0

    async def flood() -> None:
        nonlocal said
        while True:
            said += 1
            await stranger.exchange.gossip.publish(ADVERTS, advert(STRANGER, said))
            await trio.sleep(0.02)

    async with friend.adverts() as events:
        began = trio.current_time()
        await attacked(friend, honest, flood)
        await honest.publish_advert(advert(key_of("one")))
        with trio.fail_after(PATIENCE_S):
            while (event := await events.receive()).seller != honest.peer_id:
                heard += event.seller == STRANGER.peer_id
        allowed = ADVERTS_BURST_PER_SELLER + 2 * (trio.current_time() - began) + 1
    assert heard <= allowed
    assert len(honest.directory) <= 2


async def test_bad_signatures_end_the_connection(trio_of):
    honest, stranger, friend = trio_of
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")

    async def flood() -> None:
        with suppress(Exception):
            while True:
                message = gossip_message(SENDER, os.urandom(64), [TOPIC])
                message.signature = bytes(64)
                await stream.write(rpc_bytes(publish=[message]))
        await trio.sleep_forever()

    await attacked(friend, honest, flood)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await until(lambda: honest.conduct.banned(stranger.peer_id))
        nursery.cancel_scope.cancel()
    await until(lambda: stranger.host.get_id() not in honest.connections.live())
    assert friend.host.get_id() in honest.connections.live()


async def test_flood_of_gossip_is_read_slowly_and_then_ended(trio_of, monkeypatch):
    honest, stranger, friend = trio_of
    pubsub = honest.exchange.gossip._pubsub
    monkeypatch.setattr(pubsub._waits, "_burst", 10)
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")

    async def flood() -> None:
        empty = rpc_bytes() * 200
        with suppress(Exception):
            while True:
                await stream.write(empty)
        await trio.sleep_forever()

    await attacked(friend, honest, flood)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await until(lambda: honest.conduct.banned(stranger.peer_id), PATIENCE_S)
        nursery.cancel_scope.cancel()
    assert len(pubsub._tolls._levels) <= OVERLAY_CONNECTIONS_MAX


@pytest.mark.parametrize(
    "fields",
    [
        {"publish": [rpc_pb2.Message(data=b"x", topicIDs=[TOPIC])] * 600},
        {"control": rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"x"] * 5000)])},
        {
            "control": rpc_pb2.ControlMessage(
                graft=[rpc_pb2.ControlGraft(topicID=f"{number}") for number in range(2000)]
            )
        },
        {"publish": [rpc_pb2.Message(data=b"x" * 70_000, topicIDs=[TOPIC])]},
    ],
    ids=["messages", "ids", "grafts", "bytes"],
)
async def test_rpc_that_asks_for_too_much_is_refused(pair, fields):
    honest, stranger = pair
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")
    await stream.write(rpc_bytes(**fields))
    with trio.fail_after(10):
        with suppress(Exception):
            while await stream.read(1):
                pass
    await works(honest, stranger)


async def test_subscriptions_are_bounded(pair):
    honest, stranger = pair
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")
    options = rpc_pb2.RPC.SubOpts
    for kind in ("junk", "adverts"):
        for start in range(0, 300, 30):
            topics = [f"/lumaris/test/{kind}/{number}" for number in range(start, start + 30)]
            found = [options(subscribe=True, topicid=topic) for topic in topics]
            await stream.write(rpc_bytes(subscriptions=found))
    await works(honest, stranger)
    followed = honest.exchange.gossip._pubsub.peer_topics
    assert len(followed) <= 33
    assert not any("junk" in topic for topic in followed)


JUNK = [
    b"\xff" * 400,
    os.urandom(4000),
    b"\0\0\0\1",
    frames.encode(Kind.HEADER, b"{}") * 50,
    encode_varint_prefixed(os.urandom(200)),
]


async def test_junk_on_every_protocol_we_serve():
    async with open_host(member("one")) as honest, open_host(member("friend")) as friend:
        addresses = (await honest.reachability()).addresses
        await friend.connect(addresses)
        served = [str(name) for name in honest.host.multiselect.handlers if name]
        assert HELLO in served
        assert index.PROTOCOL in served
        for protocol in served:
            async with open_host(member(f"junk {protocol}")) as attacker:
                await attacker.connect(addresses)
                for junk in JUNK:
                    with trio.move_on_after(0.05), suppress(Exception):
                        stream = await raw_stream(attacker, honest, protocol)
                        await stream.write(junk)
                        await stream.muxed_stream.close()
                        while await stream.read(65536):
                            pass
            await works(honest, friend)
        assert len(honest.directory) == 0


async def test_window_violation_ends_the_connection(trio_of):
    honest, stranger, friend = trio_of
    release = trio.Event()

    async def deaf(stream) -> None:
        await release.wait()

    async with honest.serve("/deaf/1", deaf):
        stream = await raw_stream(stranger, honest, "/deaf/1")
        muxed = stream.muxed_stream

        async def push() -> None:
            with suppress(Exception):
                while True:
                    muxed.send_window = 1 << 30
                    await stream.write(b"x" * 65_536)
            await trio.sleep_forever()

        await attacked(friend, honest, push)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            await until(lambda: honest.conduct.banned(stranger.peer_id))
            nursery.cancel_scope.cancel()
        await until(lambda: stranger.host.get_id() not in honest.connections.live())
        release.set()
    assert friend.host.get_id() in honest.connections.live()


async def test_slow_streams_hold_nothing_for_long(trio_of, monkeypatch):
    """A byte and then silence, on what answers strangers and members."""
    honest, stranger, friend = trio_of
    monkeypatch.setattr(index, "_EXCHANGE_S", 0.5)
    opened = []

    async def dribble() -> None:
        for number in range(60):
            protocol = (index.PROTOCOL, HELLO)[number % 2]
            with suppress(Exception):
                stream = await raw_stream(stranger, honest, protocol)
                await stream.write(b"\0")
                opened.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attacked, friend, honest, dribble)

    def held() -> int:
        mine = stranger.host.get_id()
        found = honest.host.get_network().connections.get(mine, ())
        return sum(len(connection.muxed_conn.streams) for connection in found)

    assert opened
    # Some streams stay by right: gossip, hellos and health checks.
    await until(lambda: held() <= 8, PATIENCE_S)


async def test_half_open_handshakes_keep_nobody_out(monkeypatch):
    async with (
        open_host(member("one")) as honest,
        open_host(member("friend")) as friend,
        AsyncExitStack() as stack,
    ):
        (address,) = (await honest.reachability()).addresses
        swarm = honest.host.get_network()
        port = int(address.split("/")[4])
        for _ in range(400):
            stack.push_async_callback(
                trio.aclose_forcefully, await trio.open_tcp_stream("127.0.0.1", port)
            )
        await until(lambda: swarm._shaking)
        with trio.fail_after(PATIENCE_S):
            while not await friend.connect([address]):
                await trio.sleep(0.05)
        assert len(swarm._shaking) <= HANDSHAKES_MAX
        await works(honest, friend)


async def test_old_advert_comes_back_to_nobody_after_a_restart():
    seller = key_of("seller")
    old, newest = advert(seller, 1), advert(seller, 5)
    async with (
        open_host(member("friend")) as friend,
        open_host(member(STRANGER)) as stranger,
    ):
        await friend.publish_advert(newest)
        stranger.directory.offer(old, time.time())
        for addresses in ((friend, stranger), (stranger, friend)):
            async with open_host(member("one")) as restarted, restarted.adverts() as events:
                for host in addresses:
                    await restarted.connect((await host.reachability()).addresses)
                with trio.fail_after(10):
                    while (await next_of(events, seller.peer_id)).seq != 5:
                        pass
                stream = await stranger.open_stream(restarted.peer_id, index.PROTOCOL)
                async with stream:
                    await index.exchange(stream, index.Query(), [old], lambda data: None)
                assert restarted.directory.holds(newest)


async def test_two_hosts_of_one_key_harm_nobody_else(trio_of):
    honest, stranger, friend = trio_of
    addresses = (await honest.reachability()).addresses
    async with open_host(member(STRANGER)) as twin:
        for _ in range(3):
            await twin.connect(addresses)
            await stranger.connect(addresses)
        async with friend.adverts() as events:
            for seq, host in ((1, stranger), (2, twin)):
                with suppress(RemoteError):
                    await host.publish_advert(advert(STRANGER, seq))
            await honest.publish_advert(advert(key_of("one")))
            await next_of(events, honest.peer_id)
        await works(honest, friend)
    assert len(honest.admission) <= 3


async def test_crowd_of_strangers(monkeypatch):
    monkeypatch.setattr(admission_module, "STRANGERS_MAX", 4)
    async with open_host(member("one")) as honest, open_host(member("friend")) as friend:
        addresses = (await honest.reachability()).addresses
        await friend.connect(addresses)

        async def crowd() -> None:
            async def come(number: int) -> None:
                async with open_host(uncertified(f"crowd {number}")) as each:
                    while True:
                        await each.connect(addresses)
                        await trio.sleep(0.2)

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(come, number)

        await attacked(friend, honest, crowd)
        assert len(honest.strangers) <= 4
        assert friend.host.get_id() in honest.connections.live()
        assert [info.peer for info in await honest.peers()] == [friend.peer_id]
