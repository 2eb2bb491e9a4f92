"""The golden bytes of the network: unchanged since they were written down, and still understood."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.security.noise.messages import NoiseHandshakePayload, verify_handshake_payload_sig

from lumaris_overlay.bulk.part import chunk_list
from lumaris_overlay.bulk.wire import Wire, chunks_of
from lumaris_overlay.libp2p import dht_wire, hello, index, reach
from lumaris_overlay.links import wire
from lumaris_overlay.links.wire import Attach, Attached, Resumed
from lumaris_overlay.validate import MembershipGate
from lumaris_protocol import frames, ids, protocols
from lumaris_protocol.keys import KeyPair
from tests.protocol import parties as p
from tests.vectors import generate, network

READERS: dict[tuple[str, str], type[msgspec.Struct]] = {
    (protocols.HELLO, "greeting"): hello.Greeting,
    (protocols.HELLO, "greeting of a stranger"): hello.Greeting,
    (index.PROTOCOL, "query for all"): index.Query,
    (index.PROTOCOL, "query by filter"): index.Query,
    (index.PROTOCOL, "answer"): index.Answer,
    (reach.PROTOCOL, "ask"): reach.Ask,
    (reach.PROTOCOL, "answer"): reach.Answer,
    (protocols.TENDER, "tender"): protocols.TenderHeader,
    (protocols.BLOB, "put"): protocols.BlobHeader,
    (protocols.BLOB, "get"): protocols.BlobHeader,
    (protocols.BLOB, "ready"): protocols.BlobReply,
    (protocols.BLOB, "stored"): protocols.BlobReply,
}


def load(name: str) -> Any:
    return json.loads((generate.FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "text"), network.files().items(), ids=network.files())
def test_committed_vectors_are_what_the_source_makes(name: str, text: str) -> None:
    assert (generate.FOLDER / name).read_text(encoding="utf-8") == text, (
        f"{name} differs: the wire changed. Say why in the commit, then run "
        "`python -m tests.vectors.generate`."
    )


def test_a_handshake_payload_proves_its_key_and_shows_a_valid_certificate() -> None:
    row = load("noise.json")
    payload = NoiseHandshakePayload.deserialize(bytes.fromhex(row["payload"]))
    static = X25519PrivateKey.from_bytes(bytes.fromhex(row["noise_static_private_key"]))
    assert verify_handshake_payload_sig(payload, static.get_public_key())
    assert static.get_public_key().to_bytes().hex() == row["noise_static_public_key"]
    shown = payload.get_early_data()
    assert shown is not None
    assert shown.hex() == row["certificate"]
    peer = KeyPair(bytes.fromhex(row["key_seed"])).peer_id
    gate = MembershipGate(p.NETWORK, frozenset({p.COORDINATOR.peer_id}))
    assert gate.check(shown, peer, p.NOW).message.roles == ("seller",)


def test_every_header_is_read_as_what_it_is() -> None:
    rows = load("headers.json")
    assert {(row["protocol"], row["what"]) for row in rows} == set(READERS)
    for row in rows:
        (frame,) = frames.Decoder().feed(bytes.fromhex(row["frame"]))
        assert (frame.kind, frame.body.decode()) == (frames.Kind.HEADER, row["json"])
        found = msgspec.json.decode(frame.body, type=READERS[row["protocol"], row["what"]])
        assert msgspec.json.encode(found).decode() == row["json"]


def test_dht_messages_are_read_as_what_they_are() -> None:
    rows = load("dht.json")
    for row in rows["keys"]:
        assert hashlib.sha256(row["key"].encode()).hexdigest() == row["place"]
        dht_wire.read_key(row["key"].encode())
    asked = {row["what"]: row for row in rows["exchanges"]}
    found = {}
    for what, row in asked.items():
        question = dht_wire.decode_question(unprefixed(row["question"]))
        found[what] = question, dht_wire.decode_answer(unprefixed(row["answer"]), question)
    assert found["put"][0].value.hex() == rows["record"]
    assert found["put"][1].value == found["put"][0].value
    assert found["get"][1].value is not None
    assert found["get"][1].value.hex() == rows["endpoints"]
    assert [named.peer for named in found["find_node"][1].closer] == [p.BUYER.peer_id]
    (endpoint,) = dht_wire.unpack(bytes.fromhex(rows["endpoints"]), 1)
    assert endpoint == network.sample("endpoint")


def unprefixed(text: str) -> bytes:
    """A message without its length, a varint of one or two bytes here."""
    data = bytes.fromhex(text)
    start = 1 if data[0] < 0x80 else 2
    assert len(data) - start == data[0] % 0x80 + (data[1] * 0x80 if start == 2 else 0)
    return data[start:]


def test_link_frames_are_read_as_what_they_are() -> None:
    rows = load("link_frames.json")
    assert [row["number"] for row in rows] == [int(kind) for kind in wire.Kind]
    for row in rows:
        (frame,) = wire.Decoder().feed(bytes.fromhex(row["frame"]))
        assert (frame.kind.name, frame.lane, frame.body.hex()) == (
            row["kind"],
            row["lane"],
            row["body"],
        )


def test_a_link_goes_on_where_the_other_side_says_that_it_is() -> None:
    """The counts in the handshake are those of the frames that arrived before it."""
    received = {"dialler": 0, "listener": 0}
    other = {"dialler": "listener", "listener": "dialler"}
    told: list[tuple[str, int]] = []
    for row in load("link.json"):
        if row["what"].startswith("TCP"):
            continue
        for frame in wire.Decoder().feed(bytes.fromhex(row["bytes"])):
            if frame.kind is wire.Kind.ATTACH:
                wire.decode_json(frame, wire.Kind.ATTACH, Attach)
            elif frame.kind is wire.Kind.ATTACHED:
                found = wire.decode_json(frame, wire.Kind.ATTACHED, Attached)
                told.append(("listener", found.received))
                assert found.received == received["listener"]
            elif frame.kind is wire.Kind.RESUMED:
                back = wire.decode_json(frame, wire.Kind.RESUMED, Resumed)
                told.append(("dialler", back.received))
                assert back.received == received["dialler"]
            elif frame.kind is wire.Kind.ACK:
                assert int.from_bytes(frame.body, "big") == received[row["from"]]
            elif frame.kind <= wire.LAST_COUNTED and not row["what"].endswith("lost"):
                received[other[row["from"]]] += 1
    assert told == [("listener", 0), ("dialler", 0), ("listener", 2), ("dialler", 1)]


def test_bulk_bytes(tmp_path: Path) -> None:
    row = load("bulk.json")
    size_bytes = row["file"]["size_bytes"]
    near, far = socket.socketpair()
    with near, far:
        Wire(near).ask(row["ask"]["first"], row["ask"]["count"], size_bytes)
        assert far.recv(100).hex() == row["ask"]["bytes"]
    path = tmp_path / "file"
    path.write_bytes(bytes(n % 251 for n in range(size_bytes)))
    file = os.open(path, os.O_RDONLY)
    try:
        listed = chunk_list(file, size_bytes)
    finally:
        os.close(file)
    (frame,) = frames.Decoder().feed(bytes.fromhex(row["file"]["chunk_list_frame"]))
    assert frame.body == listed
    assert chunks_of(size_bytes) == row["file"]["chunks"] == len(listed) // 32
    assert ids.digest(path.read_bytes()) == row["file"]["sha256"] == f"sha256:{listed[-32:].hex()}"
