"""The signed envelope: how every statement travels and how it is checked.

Layout of libp2p RFC 0002, as a protobuf message with four fields in this order:

    1 public_key    libp2p's protobuf form of an Ed25519 key, 36 bytes
    2 payload_type  ASCII, the message's type such as `advert`
    3 payload       UTF-8 JSON, carried and stored verbatim
    5 signature     Ed25519 over uvarint-length-prefixed (domain, payload_type, payload)

The domain is `lumaris/<network>/<type>/v1`, so a signature never means anything in another network
or as another type. The payload is opaque here: it is never re-encoded to verify, which removes the
whole class of faults where two sides canonicalise differently. Decoding is strict (field order,
minimal varints, no trailing bytes), so that one document has one byte form and thus one hash.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from lumaris_protocol import keys
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.ids import digest
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import ENVELOPE_BYTES_MAX, NAME_CHARS_MAX

_FIELDS: Final = (1, 2, 3, 5)
_TAGS: Final = tuple(number << 3 | 2 for number in _FIELDS)
_TYPE_BYTES_MAX: Final = 64
_KEY_BYTES: Final = 36
_VARINT_BYTES_MAX: Final = 4  # 28 bits: above every size limit here


class Envelope(msgspec.Struct, frozen=True):
    """A decoded, not yet verified envelope. `data` is the exact bytes it came from."""

    data: bytes
    public_key: bytes
    payload_type: str
    payload: bytes
    signature: bytes

    @property
    def signer(self) -> PeerId:
        """The peer id of the key in the envelope; meaningful only after `verify`."""
        return keys.peer_id_of(self.public_key)

    @property
    def hash(self) -> str:
        """The document's name: `sha256:` of the whole envelope."""
        return digest(self.data)

    def verify(self, network: str) -> None:
        """Check the signature for this network. Raises EnvelopeError (`bad_signature`)."""
        signed = signed_bytes(network, self.payload_type, self.payload)
        if not keys.verify(self.public_key, signed, self.signature):
            raise EnvelopeError("bad_signature", f"A {self.payload_type} has a bad signature.")


def seal(key: KeyPair, network: str, payload_type: str, payload: bytes) -> bytes:
    """The bytes of a signed envelope around `payload`."""
    signature = key.sign(signed_bytes(network, payload_type, payload))
    parts = (keys.encode_public_key(key.public_key), payload_type.encode(), payload, signature)
    return b"".join(
        bytes([number << 3 | 2]) + _uvarint(len(part)) + part
        for number, part in zip(_FIELDS, parts, strict=True)
    )


def decode(data: bytes, *, size_max: int = ENVELOPE_BYTES_MAX) -> Envelope:
    """Take an envelope apart without trusting it.

    Raises EnvelopeError: `oversize` before anything is parsed, else `malformed`.
    """
    if len(data) > size_max:
        raise EnvelopeError("oversize", f"A document of {len(data)} bytes; {size_max} are allowed.")
    data = bytes(data)
    parts: list[bytes] = []
    position, end = 0, len(data)
    for tag in _TAGS:
        if position >= end or data[position] != tag:
            raise EnvelopeError("malformed", "An envelope field is missing or out of order.")
        begin = position + 2
        if begin > end or (size := data[position + 1]) >= 0x80:  # else a length of one byte
            size, begin = _read_uvarint(data, position + 1)
        position = begin + size
        if position > end:
            raise EnvelopeError("malformed", "An envelope field runs past the end.")
        parts.append(data[begin:position])
    if position != end:
        raise EnvelopeError("malformed", "Bytes follow the envelope.")
    public_key = keys.decode_public_key(parts[0])
    if public_key is None or len(parts[3]) != 64:
        raise EnvelopeError("malformed", "The envelope's key or signature is not Ed25519.")
    if not parts[1].isascii() or not 0 < len(parts[1]) <= _TYPE_BYTES_MAX:
        raise EnvelopeError("malformed", "The envelope's type is not a short ASCII name.")
    return Envelope(data, public_key, parts[1].decode(), parts[2], parts[3])


def type_of(data: bytes) -> str:
    """The type that an envelope's bytes name, without looking at the rest; "" for other bytes."""
    head = 2 + _KEY_BYTES  # the key field is of one size, and a type's length fits one byte
    if len(data) < head + 2 or data[head] != 2 << 3 | 2:
        return ""
    return data[head + 2 : head + 2 + data[head + 1]].decode("ascii", "replace")


def signed_bytes(network: str, payload_type: str, payload: bytes) -> bytes:
    """What the signature covers: domain, type and payload, each length-prefixed."""
    return b"".join((_head(network, payload_type), _uvarint(len(payload)), payload))


@lru_cache(maxsize=256)  # a few networks by the types there are
def _head(network: str, payload_type: str) -> bytes:
    if not 0 < len(network) <= NAME_CHARS_MAX or "/" in network:
        raise ValueError("a network name is 1 to 64 characters without a slash")
    domain = f"lumaris/{network}/{payload_type}/v1".encode()
    kind = payload_type.encode()
    return _uvarint(len(domain)) + domain + _uvarint(len(kind)) + kind


def _uvarint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_uvarint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES_MAX):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if byte == 0 and index > 0:
                break  # not the shortest form: the same document would have two hashes
            return value, position
    raise EnvelopeError("malformed", "An envelope length is not a minimal varint.")
