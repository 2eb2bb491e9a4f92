"""docs/protocol.md is enough: a peer made of stock libp2p, TLS, struct and JSON takes part.

Nothing of the speaking side comes from our packages. What it says is written down here as the page
has it, so that a change of the page or of the code that leaves the other behind fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr
from nacl.signing import VerifyKey

from lumaris_overlay.bulk.gate import BulkGate
from lumaris_overlay.bulk.serve import give_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_overlay.links import open_links
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated import open_network
from lumaris_protocol.protocols import BlobHeader
from tests.overlay.hosts import member
from tests.overlay.world import COORDINATOR, KEYS, NETWORK, advert, certificate, key_of, until

ENVELOPE, HEADER, DATA, END = 1, 3, 4, 5
SELLER = key_of("seller")
MIB = 1 << 20


def frame(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("!IB", len(body) + 1, kind) + body


def link_frame(kind: int, lane: int, body: bytes = b"") -> bytes:
    return struct.pack("!BII", kind, lane, len(body)) + body


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def fields(data: bytes) -> dict[int, bytes]:
    """The length-delimited fields of a protobuf message; a number field is left as its varint."""
    found, at = {}, 0
    while at < len(data):
        tag, at = data[at], at + 1
        size = shift = 0
        while True:
            byte, at = data[at], at + 1
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        if tag & 7 == 2:
            found[tag >> 3], at = data[at : at + size], at + size
        else:
            found[tag >> 3] = bytes([size])
    return found


def verified(envelope: bytes, kind: str) -> dict[str, Any]:
    """The payload of a signed document; raises when the signature is not its key's."""
    parts = fields(envelope)
    assert parts[1][:4] == bytes.fromhex("08011220")
    assert parts[2] == kind.encode()
    domain = f"lumaris/{NETWORK}/{kind}/v1".encode()
    signed = b"".join(varint(len(part)) + part for part in (domain, parts[2], parts[3]))
    VerifyKey(parts[1][4:]).verify(signed, parts[5])
    payload: dict[str, Any] = json.loads(parts[3])
    return payload | {"signer": str(ID(b"\x00\x24" + parts[1]))}


class Reader:
    """Exact numbers of bytes from whatever gives some."""

    def __init__(self, some: Callable[[], Awaitable[bytes]]) -> None:
        self._some, self._buffer = some, b""

    async def take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = await self._some()
            assert data, "the stream ended early"
            self._buffer += data
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    async def frame(self) -> tuple[int, bytes]:
        size, kind = struct.unpack("!IB", await self.take(5))
        return kind, await self.take(size - 1)

    async def link_frame(self) -> tuple[int, int, bytes]:
        kind, lane, size = struct.unpack("!BII", await self.take(9))
        return kind, lane, await self.take(size)


@pytest.mark.slow
async def test_a_stock_libp2p_host_joins_and_reads_verified_adverts() -> None:
    me = key_of("other make")
    pair = create_new_key_pair(me.seed)
    noise = StockNoise(pair, noise_privkey=create_x25519().private_key)
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    other: Any = new_host(
        key_pair=pair,
        sec_opt={"/noise": noise},  # type: ignore[dict-item]  # protocol ids are texts
        muxer_opt={"/yamux/1.0.0": Yamux},  # type: ignore[dict-item]
        listen_addrs=listen,
    )
    pubsub = stock_gossip(other)
    async with (
        open_host(member(SELLER)) as host,
        other.run(listen),
        background_trio_service(pubsub),
        background_trio_service(pubsub.router),
    ):
        await pubsub.wait_until_ready()
        (address,) = (await host.reachability()).addresses
        await other.connect(info_from_p2p_addr(Multiaddr(address)))
        peer = host.host.get_id()

        async def ask(protocol: str, said: bytes) -> tuple[Any, Reader]:
            stream = await other.new_stream(peer, [protocol])
            await stream.write(said)
            return stream, Reader(lambda: stream.read(65_536))

        # A greeting with a certificate makes a member of a stranger.
        shown = base64.b64encode(certificate(me.peer_id)).decode()
        greeting = {"time_ms": int(time.time() * 1000), "certificate": shown}
        _, reader = await ask("/lumaris/hello/1", frame(HEADER, json.dumps(greeting).encode()))
        kind, body = await reader.frame()
        assert kind == HEADER
        held = verified(base64.b64decode(json.loads(body)["certificate"]), "membership")
        assert (held["peer"], held["signer"]) == (SELLER.peer_id, COORDINATOR.peer_id)

        # What a stranger opened was refused, and stock libp2p tries only once.
        pubsub._schedule_peer_stream_retry(peer)
        await _directory(host, ask)
        await _dht(host, ask)
        await _gossip(host, pubsub, other.get_id())
        await other.disconnect(peer)
        await until(lambda: not host.connections.live())


Ask = Callable[[str, bytes], Awaitable[tuple[Any, Reader]]]


async def _directory(host: Libp2pOverlay, ask: Ask) -> None:
    await host.publish_advert(advert(SELLER, 1))
    query = frame(HEADER, b'{"count": 10}') + frame(END)
    _, reader = await ask("/lumaris/index/1", query)
    assert await reader.frame() == (HEADER, b'{"next":""}')
    kind, body = await reader.frame()
    found = verified(body, "advert")
    assert (kind, found["seller"], found["seq"]) == (ENVELOPE, SELLER.peer_id, 1)
    assert found["signer"] == SELLER.peer_id
    assert await reader.frame() == (END, b"")


async def _dht(host: Libp2pOverlay, ask: Ask) -> None:
    """Put our own advert, and get it back."""
    me = key_of("other make")
    key, record = f"/lumaris-peer/{me.peer_id}".encode(), advert(me)
    held = b"\x0a" + varint(len(key)) + key + b"\x12" + varint(len(record)) + record
    named = b"\x12" + varint(len(key)) + key
    put = named + b"\x1a" + varint(len(held)) + held  # type 0 is left out
    _, reader = await ask(f"/lumaris/{NETWORK}/kad/1", varint(len(put)) + put)
    assert fields(await prefixed(reader)) == fields(put)
    get = b"\x08\x01" + named
    _, reader = await ask(f"/lumaris/{NETWORK}/kad/1", varint(len(get)) + get)
    answer = fields(await prefixed(reader))
    assert (answer[1], answer[2]) == (b"\x01", key)
    assert fields(answer[3])[2] == record
    assert host.dht.store.peer(me.peer_id, time.time()) is not None


async def prefixed(reader: Reader) -> bytes:
    """A message with its length before it, a varint of two bytes here."""
    low, high = await reader.take(2)
    assert low >= 0x80 > high
    return await reader.take(low & 0x7F | high << 7)


def stock_gossip(host: Any) -> Any:
    """GossipSub with our message id and nothing else of ours."""

    def message_id(message: Any) -> bytes:
        return hashlib.sha256(f"{message.topicIDs[0]}\n".encode() + message.data).digest()

    router: Any = GossipSub(
        protocols=["/meshsub/1.1.0"],  # type: ignore[list-item]
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_initial_delay=0.1,
        heartbeat_interval=1,
    )
    return Pubsub(host, router, msg_id_constructor=message_id)


async def _gossip(host: Libp2pOverlay, pubsub: Any, me: ID) -> None:
    topic = f"/lumaris/{NETWORK}/adverts/0"
    subscription = await pubsub.subscribe(topic)
    await until(lambda: host.exchange.gossip.in_mesh(me))
    await host.publish_advert(advert(SELLER, 2))
    with trio.fail_after(10):
        while verified((await subscription.get()).data, "advert")["seq"] != 2:
            pass
    mine = advert(key_of("other make"), 7)
    await pubsub.publish(topic, mine)
    await until(lambda: host.directory.holds(mine))


class Speaker:
    """One connection of a link, by hand."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        async def some() -> bytes:
            return bytes(await stream.receive_some(65_536))

        self.reader, self.stream = Reader(some), stream

    async def begin(self, attach: dict[str, Any], received: int) -> dict[str, Any]:
        """ATTACH, ATTACHED, RESUMED."""
        await self.stream.send_all(link_frame(35, 0, json.dumps(attach).encode()))
        kind, _, body = await self.reader.link_frame()
        assert kind == 36
        resumed = json.dumps({"received": received}).encode()
        await self.stream.send_all(link_frame(37, 0, resumed))
        answer: dict[str, Any] = json.loads(body)
        return answer

    async def lane(self, number: int) -> bytes:
        """The next bytes of a lane."""
        while True:
            kind, lane, body = await self.reader.link_frame()
            if (kind, lane) == (2, number):
                return body


async def dial(target: dict[str, Any], first: bytes) -> trio.SSLStream[trio.SocketStream]:
    """TLS to a direct listener whose certificate has the pin."""
    address = target["addresses"][0]
    stream = await trio.open_tcp_stream(address["ip"], address["port"])
    await stream.send_all(first)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    tls = trio.SSLStream(stream, context, https_compatible=True)
    await tls.do_handshake()
    shown = tls.getpeercert(binary_form=True)
    assert hashlib.sha256(shown).hexdigest() == target["pin"]
    assert tls.version() == "TLSv1.3"
    return tls


async def test_a_link_and_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(251)) * (2 * MIB // 251 + 100))
    content = path.read_bytes()
    header: dict[str, Any] = {
        "session": "ses_" + "a" * 24,
        "op": "get",
        "sha256": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "size_bytes": len(content),
    }

    async def give(stream: OverlayStream) -> None:
        framed = FramedStream(stream)
        await give_file(framed, await framed.expect_header(BlobHeader), path)
        await framed.aclose()

    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(SELLER)
        await buyer.connect([seller.address])
        async with (
            open_links(seller, listen=("127.0.0.1", 0), gate=BulkGate()) as overlay,
            overlay.serve("/lumaris/blob/1", give),
        ):
            inner = Speaker(await buyer.open_stream(SELLER.peer_id, "/lumaris/link/1"))
            with trio.fail_after(20):
                link, target = await _moved(inner)
                await _fetched(link, target, header, content)
                plain = await buyer.open_stream(SELLER.peer_id, "/lumaris/blob/1")
                await _fetched_plainly(plain, header, content)
                await trio.aclose_forcefully(link.stream)


async def _moved(inner: Speaker) -> tuple[Speaker, dict[str, Any]]:
    """Begin inside the overlay, pretend that a frame was lost, and go on over TLS."""
    link = "0a" * 16
    begin = {"version": 1, "link": link, "proof": "0b" * 16, "fresh": True}
    answer = await inner.begin(begin, 0)
    assert await inner.reader.link_frame() == (7, 0, b'["/lumaris/blob/1"]')
    await inner.stream.send_all(link_frame(33, 0, b"12345678"))
    while (await inner.reader.link_frame())[0] != 34:
        pass
    target = answer["target"]
    outer = Speaker(await dial(target, b"\x01"))
    answer = await outer.begin({"link": link, "proof": target["token"]}, received=0)
    assert answer["received"] == 0
    assert await outer.reader.link_frame() == (7, 0, b'["/lumaris/blob/1"]')
    return outer, answer["target"]


async def _fetched(
    link: Speaker, target: dict[str, Any], header: dict[str, Any], content: bytes
) -> None:
    """A file over a bulk connection, with its chunk list."""
    said = json.dumps(header | {"direct": True, "listed": True}).encode()
    opened = link_frame(1, 1, b"/lumaris/blob/1") + link_frame(2, 1, frame(HEADER, said))
    await link.stream.send_all(opened)
    lane = Reader(lambda: link.lane(1))
    kind, body = await lane.frame()
    token = json.loads(body)["token"]
    assert (kind, len(token)) == (HEADER, 64)
    kind, listed = await lane.frame()
    ends = (MIB, 2 * MIB, len(content))
    assert kind == DATA
    assert listed == b"".join(hashlib.sha256(content[:end]).digest() for end in ends)

    stream = await dial(target, b"\x02")
    await stream.send_all(bytes.fromhex(token) + struct.pack("!IIII", 2, 1, 0, 2))

    async def some() -> bytes:
        return bytes(await stream.receive_some(65_536))

    bulk = Reader(some)
    assert await bulk.take(len(content) - 2 * MIB) == content[2 * MIB :]
    assert await bulk.take(2 * MIB) == content[: 2 * MIB]
    await stream.aclose()
    await link.stream.send_all(link_frame(2, 1, frame(END)))


async def _fetched_plainly(stream: OverlayStream, header: dict[str, Any], content: bytes) -> None:
    """The same file over a stream of the overlay, by a peer that speaks no links."""

    async def some() -> bytes:
        return bytes(await stream.receive_some(65_536))

    reader = Reader(some)
    await stream.send_all(frame(HEADER, json.dumps(header).encode()))
    kind, body = await reader.frame()
    assert (kind, json.loads(body)) == (HEADER, {"state": "ready", "first": 0, "token": None})
    await stream.send_all(frame(DATA, struct.pack("!II", 0, 3)))
    received = b""
    while len(received) < len(content):
        kind, body = await reader.frame()
        assert kind == DATA
        received += body
    assert received == content
    await stream.send_all(frame(END))
    assert await stream.receive_some() == b""
