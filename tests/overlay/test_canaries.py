"""One canary for each fault of libp2p 0.8.1 that we correct or keep away from.

Each shows the fault in the stock code and its absence in ours. When the first half fails, a new
release has repaired the fault, and the override can go. B14 is in `test_dht.py`, those of
gossip are in `test_canaries_gossip.py`.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import trio
from google.protobuf.message import DecodeError
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.autonat.autonat import AutoNATService
from libp2p.host.basic_host import BasicHost
from libp2p.io import utils as io_utils
from libp2p.io.exceptions import IncompleteReadError
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.security.noise.patterns import PatternXX
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from lumaris_overlay.libp2p import build, overrides
from lumaris_overlay.libp2p import host as host_module
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.host import open_host
from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_protocol.errors import LumarisError, RemoteError
from tests.overlay.attackers import (
    SENDER,
    SENDER_ID,
    TOPIC,
    idle_host,
    works,
)
from tests.overlay.hosts import member
from tests.overlay.world import advert, key_of, next_of, until

pytestmark = pytest.mark.slow

overrides.install()


# `install` puts our stream class and reader in the place of these.
STOCK_STREAM: Any = overrides.BoundedStream.__bases__[0]


def stock_io_utils() -> ModuleType:
    """libp2p's own module as it is on disk."""
    spec = importlib.util.spec_from_file_location("stock_io_utils", io_utils.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def pair():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        assert await two.connect((await one.reachability()).addresses) == 1
        yield one, two


def test_peer_id_is_libp2ps():
    assert str(idle_host().get_id()) == key_of("one").peer_id


@pytest.mark.parametrize(("stock", "held"), [(True, 1), (False, 0)])
async def test_b1_inbound_slots_come_back(stock, held, monkeypatch):
    async with open_host(member("one")) as one:
        swarm = one.host.get_network()
        if stock:
            method = Swarm._do_handle_inbound_connection
            monkeypatch.setattr(overrides.ReleasingSwarm, "_do_handle_inbound_connection", method)
        async with open_host(member("guest")) as guest:
            assert await guest.connect((await one.reachability()).addresses) == 1
            assert swarm._inbound_limiter.borrowed_tokens == 1
        await until(lambda: not one.connections.live())
        with trio.move_on_after(0.5 if stock else 10):
            await until(lambda: swarm._inbound_limiter.borrowed_tokens == 0)
        assert swarm._inbound_limiter.borrowed_tokens == held


def failing_stream(log: list[str]) -> Any:
    async def reset() -> None:
        log.append("reset")

    return SimpleNamespace(
        muxed_conn=SimpleNamespace(peer_id="peer"), set_protocol=lambda name: None, reset=reset
    )


async def test_b2_what_leaves_a_handler_stays_in_its_stream(pair):
    async def fail(stream):
        raise ValueError("from a handler")

    async def negotiate(communicator, timeout_s):
        return "/fail/1", fail

    log: list[str] = []
    stock: Any = SimpleNamespace(
        negotiate_timeout=5,
        _network=SimpleNamespace(),
        multiselect=SimpleNamespace(negotiate=negotiate),
    )
    with pytest.raises(ValueError, match="from a handler"):
        await BasicHost._swarm_stream_handler(stock, failing_stream(log))
    assert log == []

    one, two = pair
    one.host.set_stream_handler("/fail/1", fail)
    stream = await two.open_stream(one.peer_id, "/fail/1")
    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await works(one, two)


class Bytes:
    """A stream that has these bytes to read."""

    def __init__(self, data: bytes) -> None:
        self.left = data
        self.muxed_conn = SimpleNamespace(peer_id=ID(b"peer"))
        self.metric_send_channel = None

    async def read(self, n: int) -> bytes:
        data, self.left = self.left[:n], self.left[n:]
        return data


@pytest.mark.parametrize("protocol", ["/meshsub/1.1.0", "/meshsub/1.0.0"])
async def test_b3_gossip_that_does_not_parse(pair, protocol):
    junk = encode_varint_prefixed(b"\xff" * 40)
    stock: Any = SimpleNamespace(
        manager=SimpleNamespace(is_running=True), max_inbound_rpc_size=65536
    )
    stream: Any = Bytes(junk)
    with pytest.raises(DecodeError):
        await Pubsub.continuously_read_stream(stock, stream)

    one, two = pair
    stream = await two.open_stream(one.peer_id, protocol)
    await stream.send_all(junk)
    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await works(one, two)


async def test_b4_key_that_does_not_parse(pair):
    message = rpc_pb2.Message(
        data=b"x",
        topicIDs=[TOPIC],
        from_id=b"\x12\x20" + b"k" * 32,  # a hashed peer id: the key must come along
        seqno=b"12345678",
        key=b"\xff\xfe junk",
        signature=b"s" * 64,
    )
    with pytest.raises(DecodeError):
        signature_validator(message)

    one, two = pair
    stream = await two.open_stream(one.peer_id, "/meshsub/1.1.0")
    await stream.send_all(
        encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString())
    )
    await works(one, two)
    async with one.adverts() as events:
        await two.publish_advert(advert(key_of("two")))
        await next_of(events, key_of("two").peer_id)


def test_b5_b11_only_noise_and_yamux_are_offered():
    stock: Any = new_host(key_pair=create_new_key_pair(b"k" * 32)).get_network()
    assert "/plaintext/2.0.0" in stock.upgrader.security_multistream.transports
    assert any("mplex" in name for name in stock.upgrader.muxer_multistream.transports)
    ours: Any = idle_host().get_network()
    upgrader = ours.upgrader
    assert list(upgrader.security_multistream.transports) == ["/noise"]
    assert list(upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]


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
    stock = STOCK_STREAM(1, muxer, True)
    stock.recv_window -= stock.recv_window + 1
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


async def test_b7_the_muxer_we_hand_in_is_the_one_in_use(pair):
    one, _ = pair
    for held in one.host.get_network().connections.values():
        assert [type(each.muxed_conn) for each in held] == [overrides.WholeFrameYamux]


class Frames:
    """A connection that takes every frame."""

    peer_id = "peer"
    is_initiator = True

    def __init__(self) -> None:
        self.written = 0

    async def _write_frame(self, data: bytes) -> None:
        self.written += len(data) - 12

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()


async def test_b8_slow_reader_does_not_break_the_writer(autojump_clock):
    muxer: Any = Frames()
    stock = STOCK_STREAM(1, muxer, True)
    with pytest.raises(MuxedStreamError, match="after 5 seconds"):
        await stock.write(b"x" * (stock.send_window + 10))

    muxer = Frames()
    stream = overrides.BoundedStream(1, muxer, True)
    payload = b"x" * (stream.send_window + 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, payload)
        await trio.sleep(30)
        assert muxer.written == len(payload) - 10
        stream.send_window += 100
    assert muxer.written == len(payload)


async def test_b9_dials_do_not_sleep():
    found = build.connection_config()
    assert found.max_connections_per_peer == 1
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        swarm = two.host.get_network()
        swarm.connection_config.max_connections_per_peer = (
            ConnectionConfig().max_connections_per_peer
        )
        began = trio.current_time()
        assert await two.connect((await one.reachability()).addresses) == 1
        assert trio.current_time() - began >= 0.25


async def test_b10_many_small_pieces_are_read():
    class Dribble:
        def __init__(self, size: int):
            self.left = size

        async def read(self, n):
            self.left -= 1
            return b"x" if self.left >= 0 else b""

    with pytest.raises(IncompleteReadError):
        await stock_io_utils().read_exactly(Dribble(500), 300)
    assert await overrides.read_exactly(Dribble(500), 300) == b"x" * 300
    with pytest.raises(IncompleteReadError):
        await overrides.read_exactly(Dribble(10), 300)
    overrides.install()
    assert vars(yamux)["read_exactly"] is overrides.read_exactly


def test_b15_provider_records_are_capped_silently():
    """We keep no provider records: what a seller offers is in its advert."""
    stock = ProviderStore(idle_host())
    for number in range(25):
        peer = ID.from_pubkey(create_new_key_pair(bytes([number]) * 32).public_key)
        stock.add_provider(b"key", PeerInfo(peer, []))
    assert len(stock.get_providers(b"key")) == 20


async def test_b16_dial_back_takes_the_connection_that_is_there(pair):
    """So `reach` dials by itself; see `test_reach.py`."""
    one, two = pair
    closed = Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()
    stock: Any = SimpleNamespace(host=one.host)
    assert await AutoNATService._try_dial(stock, two.host.get_id(), [closed]) == closed


def test_b17_a_frozen_peer_is_noticed():
    assert not ConnectionConfig().enable_health_monitoring
    found = build.connection_config()
    # Its own check waits for each peer in turn, so ours takes its place: `test_health.py`.
    assert not found.enable_health_monitoring
    assert found.low_watermark == 0


async def test_b18_used_port_is_refused(pair, monkeypatch):
    one, _ = pair
    port = int((await one.reachability()).addresses[0].split("/")[4])
    with pytest.raises(LumarisError) as caught:
        async with open_host(member("three", listen_port=port)):
            pass
    assert caught.value.code == "port_in_use"
    monkeypatch.setattr(build, "refuse_used_port", lambda ip, port: None)
    async with open_host(member("three", listen_port=port)) as three:
        assert f"/tcp/{port}/" in (await three.reachability()).addresses[0]


async def test_b19_many_connections_are_closed_at_once(autojump_clock):
    async def close() -> None:
        await trio.sleep(0.2)

    async def close_peer(peer) -> None:
        await close()

    async def close_all() -> None:
        pass

    connections = {number: [SimpleNamespace(close=close)] for number in range(40)}
    stock: Any = SimpleNamespace(
        _closing=False,
        connections=dict(connections),
        transport_manager=SimpleNamespace(close_all=close_all),
        _manager=None,
    )
    began = trio.current_time()
    await Swarm.close(stock)
    assert trio.current_time() - began > 7

    network = SimpleNamespace(connections=connections, close_peer=close_peer)
    async with trio.open_nursery() as nursery:
        ours = Connections(
            SimpleNamespace(get_network=lambda: network),
            key_of("one").peer_id,
            nursery,
            PeerBook(None),
            bootstrap=(),
            advertised=lambda peer: (),
            on_connected=lambda peer, dialled: None,
        )
        began = trio.current_time()
        await ours.drop_all()
        assert trio.current_time() - began < 1


async def test_b20_wildcard_is_never_announced():
    stock = idle_host()
    async with stock.run([Multiaddr("/ip4/0.0.0.0/tcp/0")]):
        assert any("/0.0.0.0/" in str(address) for address in stock.get_addrs())
    async with open_host(member("one", listen_ip="0.0.0.0")) as one:
        addresses = (await one.reachability()).addresses
        assert addresses
        assert not any("/0.0.0.0/" in address for address in addresses)


async def test_b21_opening_a_stream_has_an_end(autojump_clock, monkeypatch):
    wire: Any = Frames()
    muxer = yamux.Yamux(wire, ID(b"peer"), is_initiator=True)
    with trio.move_on_after(1_000) as scope:
        for _ in range(300):
            await muxer.open_stream()
    assert scope.cancelled_caught
    assert len(muxer.streams) == 256


async def test_b21_opening_a_stream_fails_in_time(pair, monkeypatch):
    one, two = pair
    monkeypatch.setattr(host_module, "_OPEN_S", 0.1)

    async def never(peer, protocols) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(two.host, "new_stream", never)
    with trio.fail_after(10), pytest.raises(RemoteError) as caught:
        await two.open_stream(one.peer_id, "/any/1")
    assert caught.value.code == "unreachable"


async def test_b26_the_handshake_carries_the_certificate(pair):
    one, two = pair
    stock = PatternXX(
        SENDER_ID,
        SENDER.private_key,
        one.host.get_network().upgrader.security_multistream.transports["/noise"].noise_privkey,
        b"certificate",
    )
    assert not stock.make_handshake_payload().has_early_data()
    assert one.admission.admitted(two.peer_id)
    assert two.admission.admitted(one.peer_id)


async def test_b27_a_host_that_stops_still_has_addresses():
    """Gossip asks for them in a task of its own, whose error would take the host down."""
    (closed,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await closed.aclose()
    nobody: Any = None
    listener: Any = TCP().create_listener(nobody)
    listener.listeners.append(closed)
    ours: Any = idle_host()
    ours.get_network().listeners["/ip4/127.0.0.1/tcp/0"] = listener
    with pytest.raises(OSError, match="file descriptor"):
        BasicHost.get_transport_addrs(ours)
    assert ours.get_transport_addrs() == []
    assert ours.get_addrs() == []
