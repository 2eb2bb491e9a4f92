"""The DHT's keys, distances and messages: libp2p's Kademlia wire format, kept within our bounds.

A key is `/lumaris-peer/<peer id>`, holding that peer's newest record, or `/lumaris-index/<shard>`,
holding the endpoints of some index peers of the shard. Both are hashed with SHA-256, as peer ids
are, and near means a small XOR of the two hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from google.protobuf.message import DecodeError
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr

from lumaris_overlay.ports import OverlayStream
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.limits import (
    ADDRESS_CHARS_MAX,
    ADDRESSES_MAX,
    DHT_INDEX_PEERS_MAX,
    DHT_RECORD_BYTES_MAX,
    KIB,
    SHARD_ID_MAX,
)

# A question carries at most one record; an answer a whole set of index peers and the closer peers.
REQUEST_BYTES_MAX = DHT_RECORD_BYTES_MAX + 2 * KIB
ANSWER_BYTES_MAX = DHT_INDEX_PEERS_MAX * (DHT_RECORD_BYTES_MAX + 2) + 24 * KIB
# How many peers an answer may name, and how many hold a record.
CLOSER_MAX = 10

_PEER_KEY = "/lumaris-peer/"
_INDEX_KEY = "/lumaris-index/"
_KEY_BYTES_MAX = 128
_PEER_BYTES = 38
_VARINT_BYTES_MAX = 5
_READ_BYTES = 16 * KIB

GET, PUT, FIND_NODE, PING = (
    Message.MessageType.Value(name) for name in ("GET_VALUE", "PUT_VALUE", "FIND_NODE", "PING")
)


def protocol_of(network: str) -> str:
    """The protocol id of a network's DHT."""
    return f"/lumaris/{network}/kad/1"


def peer_key(peer: str) -> bytes:
    """Where the record of a peer lies."""
    return f"{_PEER_KEY}{peer}".encode()


def index_key(shard: int) -> bytes:
    """Where the index peers of a shard lie."""
    return f"{_INDEX_KEY}{shard}".encode()


def read_key(key: bytes) -> str | int:
    """The peer id or the shard of a key. Raises EnvelopeError `malformed` for any other key."""
    try:
        text = key.decode("ascii")
        if text.startswith(_PEER_KEY):
            peer = text.removeprefix(_PEER_KEY)
            public_key_of(peer)
            return peer
        shard = int(text.removeprefix(_INDEX_KEY))
    except ValueError:
        raise EnvelopeError("malformed", "That is not a key of this DHT.") from None
    if not 0 <= shard <= SHARD_ID_MAX or index_key(shard) != key:
        raise EnvelopeError("malformed", "That is not a key of this DHT.")
    return shard


def place_of_key(key: bytes) -> int:
    """Where a key lies in the space of distances."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=8192)  # the same neighbours are sorted again and again
def place_of(peer: str) -> int:
    """Where a peer lies in the space of distances."""
    return place_of_key(ID.from_base58(peer).to_bytes())


@dataclass(frozen=True)
class Named:
    """A peer and where it is said to listen."""

    peer: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a peer says of a key: the value it holds, if any, and peers nearer to it."""

    value: bytes | None
    closer: tuple[Named, ...]


@dataclass(frozen=True)
class Question:
    """What a peer asks: one of GET, PUT, FIND_NODE and PING."""

    kind: int
    key: bytes
    value: bytes = b""


def encode_question(question: Question) -> bytes:
    """The message with its length before it."""
    message = _message(question)
    if question.kind == PUT:
        message.record.key = question.key
        message.record.value = question.value
    return _prefixed(message)


def decode_question(data: bytes) -> Question:
    """Raises EnvelopeError `malformed` for what this DHT does not answer, provider records too."""
    message = _parse(data)
    if message.type not in (GET, PUT, FIND_NODE, PING) or len(message.key) > _KEY_BYTES_MAX:
        raise EnvelopeError("malformed", "The DHT message is not one that is answered.")
    value = b""
    if message.type == PUT:
        if not message.HasField("record") or message.record.key != message.key:
            raise EnvelopeError("malformed", "The record is not one for its key.")
        value = message.record.value
    return Question(message.type, message.key, value)


def encode_answer(question: Question, value: bytes | None, closer: Iterable[Named]) -> bytes:
    """The answer to a question, with its length before it."""
    message = _message(question)
    if value is not None:
        message.record.key = question.key
        message.record.value = value
    for named in closer:
        item = message.closerPeers.add()
        item.id = ID.from_base58(named.peer).to_bytes()
        item.connection = Message.ConnectionType.CAN_CONNECT
        item.addrs.extend(
            Multiaddr(address.partition("/p2p/")[0]).to_bytes()
            if "/p2p-circuit" not in address
            else Multiaddr(address).to_bytes()
            for address in named.addresses
        )
    return _prefixed(message)


def decode_answer(data: bytes, question: Question) -> Answer:
    """Raises EnvelopeError `malformed` when it does not answer the question."""
    message = _parse(data)
    if message.type != question.kind or (message.key and message.key != question.key):
        raise EnvelopeError("malformed", "The answer is to another question.")
    value = None
    if message.HasField("record") and message.record.value:
        value = message.record.value
    closer = [_named(item) for item in message.closerPeers[:CLOSER_MAX]]
    return Answer(value, tuple(named for named in closer if named is not None))


def pack(records: Sequence[bytes]) -> bytes:
    """A set of records as one value: each with two bytes of length before it."""
    return b"".join(len(data).to_bytes(2, "big") + data for data in records)


def unpack(value: bytes, count_max: int) -> list[bytes]:
    """The records of a set. Raises EnvelopeError `malformed`."""
    records: list[bytes] = []
    position = 0
    while position < len(value):
        size = int.from_bytes(value[position : position + 2], "big")
        position += 2 + size
        if not 0 < size <= DHT_RECORD_BYTES_MAX or position > len(value):
            raise EnvelopeError("malformed", "The set of records is cut short.")
        records.append(value[position - size : position])
        if len(records) > count_max:
            raise EnvelopeError("malformed", "The set holds more records than it may.")
    return records


class MessageReader:
    """Takes length-prefixed messages off a stream."""

    def __init__(self, stream: OverlayStream, size_max: int) -> None:
        self._stream, self._size_max = stream, size_max
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """The next message, or None at the end of the stream. Raises EnvelopeError."""
        while (found := self._take()) is None:
            data = await self._stream.receive_some(_READ_BYTES)
            if not data:
                if self._buffer:
                    raise EnvelopeError("truncated", "The stream ended inside a DHT message.")
                return None
            self._buffer += data
        return found

    def _take(self) -> bytes | None:
        head = self._buffer[:_VARINT_BYTES_MAX]
        length = next((at + 1 for at, byte in enumerate(head) if byte < 0x80), 0)
        if not length:
            if len(head) == _VARINT_BYTES_MAX:
                raise EnvelopeError("malformed", "The length of a DHT message is not a varint.")
            return None
        size = sum((byte & 0x7F) << 7 * at for at, byte in enumerate(head[:length]))
        if size > self._size_max:
            raise EnvelopeError("oversize", f"A DHT message of {size} bytes.")
        end = length + size
        if len(self._buffer) < end:
            return None
        found = bytes(self._buffer[length:end])
        del self._buffer[:end]
        return found


def _message(question: Question) -> Any:
    message: Any = Message()
    message.type, message.key = question.kind, question.key
    return message


def _parse(data: bytes) -> Any:
    message = Message()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise EnvelopeError("malformed", "The bytes are not a DHT message.") from None
    return message


def _prefixed(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return encode_uvarint(len(data)) + data


def _named(item: Any) -> Named | None:
    """The peer in an answer, or None when its id is not an Ed25519 key."""
    if len(item.id) != _PEER_BYTES:
        return None
    peer = str(ID(item.id))
    try:
        public_key_of(peer)
    except ValueError:
        return None
    addresses = []
    for raw in item.addrs[:ADDRESSES_MAX]:
        try:
            text = str(Multiaddr(raw))
        except Exception:  # noqa: S112 - multiaddr raises many kinds for what is not an address
            continue
        if len(text) <= ADDRESS_CHARS_MAX and text.startswith(("/ip4/", "/ip6/", "/dns")):
            addresses.append(text)
    return Named(peer, tuple(addresses))
