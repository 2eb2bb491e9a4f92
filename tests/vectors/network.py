"""Golden vectors of the network: topics, handshake, headers, the DHT, links and bulk transfers.

They complete those of `generate`, which writes these files too. Keys, times, secrets and tokens are
fixed. What is signed and random in practice (the Noise static key) is fixed here as well.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.security.noise.messages import (
    NoiseExtensions,
    NoiseHandshakePayload,
    make_handshake_payload_sig,
)

from lumaris_overlay.advert_filter import filter_of
from lumaris_overlay.bulk.threads import FIRST_BYTE
from lumaris_overlay.libp2p import dht_wire, gossip, index, mdns, reach
from lumaris_overlay.libp2p.dht_wire import Named, Question
from lumaris_overlay.libp2p.hello import Greeting
from lumaris_overlay.links import direct, wire
from lumaris_overlay.links.mux import LaneState, Mux
from lumaris_overlay.links.wire import Address, Attach, Attached, Kind, Resumed, Target
from lumaris_protocol import codec, frames, limits, protocols, shards
from lumaris_protocol.messages.advert import Gpu, Resources
from lumaris_protocol.messages.shard_map import ShardMap
from tests.protocol import parties as p
from tests.protocol.samples import samples

LINK, SECRET, TOKEN = "0a" * 16, "0b" * 16, "0c" * 16
PIN, BULK_TOKEN = "0d" * 32, "0e" * 32
_GPU = Gpu(model="t4", vram_bytes=1, count=1)
STATIC_KEY = hashlib.sha256(b"lumaris test noise static key").digest()


def gossip_names() -> dict[str, Any]:
    """Topics, the id of a message, the mDNS name, and where a shard map puts whom."""
    topic = gossip.topic_of(p.NETWORK, gossip.ADVERTS, 3)
    advert = sample("advert")
    division = samples()["shard_map"][0]
    assert isinstance(division, ShardMap)
    places = [
        {"region": region, "class": kind, "shard": shards.shard_of(division, region, kind)}
        for region in ("eu", "us-east")
        for kind in shards.CLASSES
    ]
    return {
        "network": p.NETWORK,
        "adverts_topic": topic,
        "demands_topic": gossip.topic_of(p.NETWORK, gossip.DEMANDS, 3),
        "message_data": advert.hex(),
        "message_id": hashlib.sha256(f"{topic}\n".encode() + advert).hexdigest(),
        "mdns_service": mdns.service_type(p.NETWORK),
        "shard_map": codec.encode_payload(division).decode(),
        "places": places,
    }


def noise() -> dict[str, str]:
    """A handshake payload with a certificate in its early data."""
    certificate = p.certificate(p.SELLER, "seller").data
    pair = create_new_key_pair(p.SELLER.seed)
    static = X25519PrivateKey.from_bytes(STATIC_KEY).get_public_key()
    payload = NoiseHandshakePayload(
        pair.public_key,
        make_handshake_payload_sig(pair.private_key, static),
        NoiseExtensions(early_data=certificate),
    )
    return {
        "key_seed": p.SELLER.seed.hex(),
        "noise_static_private_key": STATIC_KEY.hex(),
        "noise_static_public_key": static.to_bytes().hex(),
        "certificate": certificate.hex(),
        "extensions": payload.extensions.to_protobuf().SerializeToString().hex(),  # type: ignore[union-attr]
        "payload": payload.serialize().hex(),
    }


def headers() -> list[dict[str, str]]:
    """One HEADER frame of each kind that opens an exchange or answers one."""
    needs = msgspec.structs.replace(
        p.request().message.requirements,
        regions=("eu",),
        resources=Resources(cpu_millis=500, memory_bytes=1, gpus=(_GPU,)),
    )
    session, digest = p.id_of("session", "vector"), p.digest_of("vector")
    size_bytes = 3 * limits.CHUNK_BYTES - 1
    greeting = Greeting(
        time_ms=p.NOW * 1000 + 123,
        certificate=p.certificate(p.SELLER, "seller").data,
        protocols=(protocols.NEGOTIATE, protocols.SESSION),
        observed="/ip4/198.51.100.7/tcp/4001",
    )
    blob: dict[str, Any] = {"session": session, "sha256": digest, "size_bytes": size_bytes}
    rows: list[tuple[str, str, msgspec.Struct]] = [
        (protocols.HELLO, "greeting", greeting),
        (protocols.HELLO, "greeting of a stranger", Greeting(time_ms=p.NOW * 1000)),
        (index.PROTOCOL, "query for all", index.Query(count=limits.INDEX_PAGE_ADVERTS_MAX)),
        (
            index.PROTOCOL,
            "query by filter",
            index.Query(p.SELLER.peer_id, 10, (3, 7), filter_of(needs)),
        ),
        (index.PROTOCOL, "answer", index.Answer(p.SELLER.peer_id)),
        (reach.PROTOCOL, "ask", reach.Ask("00" * 8, (4001, 4002))),
        (reach.PROTOCOL, "answer", reach.Answer("00" * 8, "198.51.100.7", (4001,))),
        (protocols.TENDER, "tender", protocols.TenderHeader(demand=p.id_of("demand", "vector"))),
        (protocols.BLOB, "put", protocols.BlobHeader(op="put", direct=True, **blob)),
        (protocols.BLOB, "get", protocols.BlobHeader(op="get", listed=True, **blob)),
        (
            protocols.BLOB,
            "ready",
            protocols.BlobReply(state="ready", first=1, token=BULK_TOKEN),
        ),
        (protocols.BLOB, "stored", protocols.BlobReply(state="stored")),
    ]
    return [
        {
            "protocol": name,
            "what": what,
            "json": msgspec.json.encode(header).decode(),
            "frame": frames.encode(frames.Kind.HEADER, msgspec.json.encode(header)).hex(),
        }
        for name, what, header in rows
    ]


def dht() -> dict[str, Any]:
    """Keys with their places, and the messages of put, get, find-node and ping."""
    peer, record = p.SELLER.peer_id, sample("advert")
    named = Named(p.BUYER.peer_id, ("/ip4/198.51.100.7/tcp/4001",))
    keys = {"peer": dht_wire.peer_key(peer), "index": dht_wire.index_key(3)}
    endpoints = dht_wire.pack([sample("endpoint")])
    put = Question(dht_wire.PUT, keys["peer"], record)
    get = Question(dht_wire.GET, keys["index"])
    near = Question(dht_wire.FIND_NODE, bytes(32))
    ping = Question(dht_wire.PING, b"")
    exchanges = [
        ("put", put, dht_wire.encode_answer(put, record, ())),
        ("get", get, dht_wire.encode_answer(get, endpoints, [named])),
        ("find_node", near, dht_wire.encode_answer(near, None, [named])),
        ("ping", ping, dht_wire.encode_answer(ping, None, ())),
    ]
    return {
        "protocol": dht_wire.protocol_of(p.NETWORK),
        "keys": [
            {"what": what, "key": key.decode(), "place": f"{dht_wire.place_of_key(key):064x}"}
            for what, key in keys.items()
        ],
        "peer": {"id": peer, "place": f"{dht_wire.place_of(peer):064x}"},
        "record": record.hex(),
        "endpoints": endpoints.hex(),
        "exchanges": [
            {
                "what": what,
                "question": dht_wire.encode_question(question).hex(),
                "answer": answer.hex(),
            }
            for what, question, answer in exchanges
        ],
    }


def link_frames() -> list[dict[str, Any]]:
    """One frame of each kind."""
    count = (5).to_bytes(8, "big")
    bodies = [
        (Kind.OPEN, 1, protocols.NEGOTIATE.encode()),
        (Kind.DATA, 1, b"hello"),
        (Kind.CREDIT, 1, (131_072).to_bytes(4, "big")),
        (Kind.EOF, 1, b""),
        (Kind.STOP, 1, b""),
        (Kind.RESET, 1, b""),
        (Kind.SERVES, 0, msgspec.json.encode((protocols.NEGOTIATE, protocols.BLOB))),
        (Kind.CLOSE, 0, b""),
        (Kind.ACK, 0, count),
        (Kind.PING, 0, bytes(8)),
        (Kind.PONG, 0, bytes(8)),
        (Kind.ATTACH, 0, msgspec.json.encode(Attach(link=LINK, proof=SECRET, fresh=True))),
        (Kind.ATTACHED, 0, msgspec.json.encode(Attached(received=0, target=_target()))),
        (Kind.RESUMED, 0, msgspec.json.encode(Resumed(received=5))),
        (Kind.REFUSED, 0, b""),
    ]
    return [
        {
            "kind": kind.name,
            "number": int(kind),
            "lane": lane,
            "body": body.hex(),
            "frame": wire.encode(kind, lane, body).hex(),
        }
        for kind, lane, body in bodies
    ]


class Conversation:
    """What two ends of a link say, as it is said."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.opened: list[LaneState] = []
        self.ends = {
            "dialler": Mux(initiator=True),
            "listener": Mux(initiator=False, on_lane=self._accept),
        }

    def _accept(self, lane: LaneState) -> bool:
        self.opened.append(lane)
        return True

    def say(self, who: str, what: str, data: bytes) -> None:
        """Note bytes of the beginning of a connection."""
        self.rows.append({"from": who, "what": what, "bytes": data.hex()})

    def pass_on(self, who: str, what: str, *, lost: bool = False) -> None:
        """Send what one end has to send; the other end takes it unless it is `lost`."""
        data = self.ends[who].take()
        self.say(who, what, data)
        if not lost:
            other = self.ends["listener" if who == "dialler" else "dialler"]
            for frame in wire.Decoder().feed(data):
                other.receive(frame)


def link_conversation() -> list[dict[str, str]]:
    """A link begins inside the overlay, carries a lane, loses frames, and goes on over TLS."""
    talk = Conversation()
    dialler, listener = talk.ends["dialler"], talk.ends["listener"]
    begin = Attach(link=LINK, proof=SECRET, fresh=True)
    answer = Attached(received=0, target=_target())
    talk.say("dialler", "overlay: ATTACH", wire.encode_json(Kind.ATTACH, begin))
    talk.say("listener", "overlay: ATTACHED", wire.encode_json(Kind.ATTACHED, answer))
    talk.say("dialler", "overlay: RESUMED", wire.encode_json(Kind.RESUMED, Resumed(received=0)))
    listener.say_serves((protocols.NEGOTIATE,))
    talk.pass_on("listener", "overlay: SERVES")
    lane = dialler.open(protocols.NEGOTIATE)
    assert lane is not None
    dialler.write(lane, memoryview(b"question"))
    talk.pass_on("dialler", "overlay: ACK, OPEN, DATA")
    listener.write(talk.opened[0], memoryview(b"answer"))
    listener.finish(talk.opened[0])
    talk.pass_on("listener", "overlay: ACK, DATA, EOF; lost", lost=True)

    moved = Attach(link=LINK, proof=TOKEN)
    back = Attached(received=listener.received, target=_target())
    mine = Resumed(received=dialler.received)
    talk.say("dialler", "TCP: the first byte, before TLS", direct.FIRST_LINK)
    talk.say("dialler", "TLS: ATTACH", wire.encode_json(Kind.ATTACH, moved))
    talk.say("listener", "TLS: ATTACHED", wire.encode_json(Kind.ATTACHED, back))
    talk.say("dialler", "TLS: RESUMED", wire.encode_json(Kind.RESUMED, mine))
    dialler.resume(listener.received)
    listener.resume(dialler.received)
    talk.pass_on("listener", "TLS: DATA and EOF again")
    assert (dialler.read(lane, 100), lane.ended) == (b"answer", True)
    dialler.close(lane)
    talk.pass_on("dialler", "TLS: ACK, EOF")
    return talk.rows


def bulk() -> dict[str, Any]:
    """What goes over a bulk connection, and the chunk list of a file; byte n of it is n mod 251."""
    size_bytes = 2 * limits.CHUNK_BYTES + 1000
    content = (bytes(range(251)) * (size_bytes // 251 + 1))[:size_bytes]
    ends = [*range(limits.CHUNK_BYTES, size_bytes, limits.CHUNK_BYTES), size_bytes]
    listed = [hashlib.sha256(content[:end]).hexdigest() for end in ends]
    return {
        "first_byte": FIRST_BYTE.hex(),
        "token": BULK_TOKEN,
        "token_bytes": bytes.fromhex(BULK_TOKEN).hex(),
        "ask": {"first": 1, "count": 2, "bytes": "0000000100000002"},
        "file": {
            "size_bytes": size_bytes,
            "sha256": f"sha256:{listed[-1]}",
            "chunks": len(listed),
            "chunk_list_frame": frames.encode(
                frames.Kind.DATA, bytes.fromhex("".join(listed))
            ).hex(),
        },
    }


def files() -> dict[str, str]:
    """The text of every vector file by its name."""
    parts = {
        "gossip.json": gossip_names(),
        "noise.json": noise(),
        "headers.json": headers(),
        "dht.json": dht(),
        "link_frames.json": link_frames(),
        "link.json": link_conversation(),
        "bulk.json": bulk(),
    }
    return {
        name: json.dumps(part, indent=1, ensure_ascii=False) + "\n" for name, part in parts.items()
    }


def sample(kind: str) -> bytes:
    """The envelope of the sample message of a type."""
    message, key = samples()[kind]
    return codec.sign(message, key, p.NETWORK).data


def _target() -> Target:
    return Target(addresses=(Address("198.51.100.7", 4002),), pin=PIN, token=TOKEN)
