"""One canary for each fault of libp2p 0.8.1 that `overrides` corrects.

Where it is quick, the stock behaviour is shown too: when that half fails, a new release has
repaired the fault, and the override can go.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from libp2p.io.exceptions import IncompleteReadError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux import yamux
from libp2p.utils.varint import encode_varint_prefixed

from lumaris_overlay.libp2p import build, overrides
from lumaris_overlay.libp2p.host import HostConfig, open_host
from lumaris_protocol.errors import LumarisError
from tests.overlay.world import KEYS, NETWORK, advert, echo, key_of, next_of, until

pytestmark = pytest.mark.slow


def config(name: str, **settings) -> HostConfig:
    return HostConfig(key=key_of(name), network=NETWORK, coordinator_keys=KEYS, **settings)


@pytest.fixture
async def pair():
    async with open_host(config("one")) as one, open_host(config("two")) as two:
        assert await two.connect((await one.reachability()).addresses) == 1
        yield one, two


async def works(one, two) -> None:
    """The host `one` is alive: it still answers and gossips."""
    protocol = f"/alive/{os.urandom(4).hex()}"
    async with one.serve(protocol, echo):
        stream = await two.open_stream(
            one.peer_id, protocol, addresses=(await one.reachability()).addresses
        )
        with trio.fail_after(10):
            async with stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"


def test_peer_id_is_libp2ps():
    host = build.build_host(key_of("one"), build.dialable, overrides.ClosingTCP())
    assert str(host.get_id()) == key_of("one").peer_id


def test_b5_only_noise_and_yamux_are_offered():
    host: Any = build.build_host(key_of("one"), build.dialable, overrides.ClosingTCP())
    upgrader = host.get_network().upgrader
    assert list(upgrader.security_multistream.transports) == ["/noise"]
    assert list(upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]


def test_b9_b17_connection_settings():
    found = build.connection_config()
    assert found.max_connections_per_peer == 1
    assert found.low_watermark == 0
    assert found.enable_health_monitoring
    assert found.abort_connection_on_ping_failure
    assert 9 <= found.health_check_interval <= 15


async def test_b1_inbound_slots_come_back():
    async with open_host(config("one")) as one:
        swarm = one.host.get_network()
        assert type(swarm)._do_handle_inbound_connection is not Swarm._do_handle_inbound_connection
        for number in range(3):
            async with open_host(config(f"guest {number}")) as guest:
                assert await guest.connect((await one.reachability()).addresses) == 1
                assert swarm._inbound_limiter.borrowed_tokens == 1
            await until(lambda: swarm._inbound_limiter.borrowed_tokens == 0)


async def test_b2_exception_in_a_raw_handler_leaves_the_host_alive(pair):
    one, two = pair

    async def fail(stream):
        raise ValueError("from a handler")

    one.host.set_stream_handler("/fail/1", fail)
    stream = await two.open_stream(one.peer_id, "/fail/1")
    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await works(one, two)


@pytest.mark.parametrize("protocol", ["/meshsub/1.1.0", "/meshsub/1.0.0"])
async def test_b3_gossip_that_does_not_parse_leaves_the_host_alive(pair, protocol):
    one, two = pair
    stream = await two.open_stream(one.peer_id, protocol)
    await stream.send_all(encode_varint_prefixed(b"\xff" * 40))
    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await works(one, two)


async def test_b4_key_that_does_not_parse_leaves_the_host_alive(pair):
    from libp2p.pubsub.pb import rpc_pb2

    one, two = pair
    message = rpc_pb2.Message(
        data=b"x",
        topicIDs=[one.exchange.gossip.topic],
        from_id=b"\x12\x20" + b"k" * 32,  # a hashed peer id: the key must come along
        seqno=b"12345678",
        key=b"\xff\xfe junk",
        signature=b"s" * 64,
    )
    stream = await two.open_stream(one.peer_id, "/meshsub/1.1.0")
    await stream.send_all(
        encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString())
    )
    await works(one, two)
    async with one.adverts() as events:
        await two.publish_advert(advert(key_of("two")))
        await next_of(events, key_of("two").peer_id)


class Wire:
    """A secured connection whose writes wait until told."""

    is_initiator = True

    def __init__(self) -> None:
        self.written = bytearray()
        self.go = trio.Event()

    async def write(self, data: bytes) -> None:
        self.written += data[: len(data) // 2]
        await self.go.wait()
        self.written += data[len(data) // 2 :]


async def test_b6_receive_window_is_enforced():
    muxer: Any = SimpleNamespace(peer_id="peer", stream_buffers={})
    stream = overrides.BoundedStream(1, muxer, True)
    stream.recv_window -= stream.recv_window
    with pytest.raises(trio.TooSlowError):
        stream.recv_window -= 1


@pytest.mark.parametrize(
    ("kind", "whole"), [(overrides.WholeFrameYamux, True), (yamux.Yamux, False)]
)
async def test_b7_cancelled_write_sends_whole_frames(kind, whole, autojump_clock):
    wire: Any = Wire()
    muxer = kind(wire, ID(b"peer"), is_initiator=True)
    frame = b"\0" * 12 + b"payload."
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer._write_frame, frame)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        wire.go.set()
    assert (bytes(wire.written) == frame) is whole


async def test_b8_slow_reader_does_not_break_the_writer(autojump_clock):
    class Frames:
        peer_id = "peer"
        written = 0

        async def _write_frame(self, data):
            self.written += len(data) - 12

    muxer: Any = Frames()
    stream = overrides.BoundedStream(1, muxer, True)
    payload = b"x" * (stream.send_window + 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, payload)
        await trio.sleep(30)
        assert muxer.written == len(payload) - 10
        stream.send_window += 100
    assert muxer.written == len(payload)


async def test_b10_many_small_pieces_are_read():
    class Dribble:
        def __init__(self, size: int):
            self.left = size

        async def read(self, n):
            self.left -= 1
            return b"x" if self.left >= 0 else b""

    assert await overrides.read_exactly(Dribble(500), 300) == b"x" * 300
    with pytest.raises(IncompleteReadError):
        await overrides.read_exactly(Dribble(10), 300)
    overrides.install()
    assert vars(yamux)["read_exactly"] is overrides.read_exactly


def test_b13_validator_is_synchronous_and_b12_spam_protection_off():
    host = build.build_host(key_of("one"), build.dialable, overrides.ClosingTCP())
    from lumaris_overlay.libp2p.gossip import AdvertGossip

    gossip = AdvertGossip(host, NETWORK, lambda *_: True)
    assert not gossip._pubsub.topic_validators[gossip.topic].is_async
    assert not gossip._router.spam_protection_enabled
    assert gossip._router.heartbeat_interval == 1
    assert list(gossip._router.protocols) == ["/meshsub/1.1.0", "/meshsub/1.0.0"]


async def test_b18_used_port_is_refused(pair):
    one, _ = pair
    port = int((await one.reachability()).addresses[0].split("/")[4])
    with pytest.raises(LumarisError) as caught:
        async with open_host(config("three", listen_port=port)):
            pass
    assert caught.value.code == "port_in_use"


async def test_b19_closing_with_many_peers_is_quick():
    async with open_host(config("a")) as a, open_host(config("b")) as b:
        async with open_host(config("hub")) as hub:
            addresses = (await hub.reachability()).addresses
            await a.connect(addresses)
            await b.connect(addresses)
            deadline = trio.current_time() + 5
        assert trio.current_time() < deadline


async def test_b20_wildcard_is_never_announced():
    async with open_host(config("one", listen_ip="0.0.0.0")) as one:
        addresses = (await one.reachability()).addresses
        assert addresses
        assert not any("/0.0.0.0/" in address for address in addresses)
