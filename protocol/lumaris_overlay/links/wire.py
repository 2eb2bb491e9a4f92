"""The frames of a link: how the two programs of a pair share one connection.

A frame is a kind (1 byte), a lane number (4 bytes, big-endian, 0 where no lane is meant), the size
of the body (4 bytes) and the body. Frames up to `CLOSE` are counted by both sides and sent again
on the next connection when their arrival is not certain; the others belong to one connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from lumaris_overlay.links.target import DirectTarget
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import (
    ADDRESSES_MAX,
    LINK_FRAME_BYTES_MAX,
    LINK_PROTOCOLS_MAX,
    NAME_CHARS_MAX,
)

_HEADER = struct.Struct("!BII")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a frame says."""

    OPEN = 1  # body: the protocol's name
    DATA = 2  # body: bytes of the lane
    CREDIT = 3  # body: how many more bytes of the lane may be sent (4 bytes)
    EOF = 4  # the sender says nothing more on this lane
    STOP = 5  # the sender reads nothing more on this lane
    RESET = 6  # the lane is given up both ways
    SERVES = 7  # JSON: the protocols that the sender answers from now on
    CLOSE = 8  # the link ends here, with all its lanes
    # --- of one connection, not counted ---
    ACK = 32  # body: how many counted frames have arrived so far (8 bytes)
    PING = 33  # body: 8 bytes that PONG returns
    PONG = 34
    ATTACH = 35  # JSON: who dials which link
    ATTACHED = 36  # JSON: what has arrived there, and how to dial next time
    RESUMED = 37  # JSON: what has arrived here; both sides send the rest from now on
    REFUSED = 38  # there is no such link, or the token does not open it


LAST_COUNTED = Kind.CLOSE
_KINDS = {int(kind): kind for kind in Kind}
# The size of each body that is not free; (least, most).
_SIZES = {
    Kind.OPEN: (1, NAME_CHARS_MAX),
    Kind.DATA: (1, LINK_FRAME_BYTES_MAX),
    Kind.CREDIT: (4, 4),
    Kind.SERVES: (2, LINK_PROTOCOLS_MAX * (NAME_CHARS_MAX + 3) + 2),
    Kind.ACK: (8, 8),
    Kind.PING: (8, 8),
    Kind.PONG: (8, 8),
    Kind.ATTACH: (2, 1024),
    Kind.ATTACHED: (2, 2048),
    Kind.RESUMED: (2, 1024),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame."""

    kind: Kind
    lane: int
    body: bytes


def encode(kind: Kind, lane: int = 0, body: bytes | memoryview = b"") -> bytes:
    """The bytes of one frame."""
    return _HEADER.pack(kind, lane, len(body)) + body


class Decoder:
    """Turns received bytes into frames. After an error it stays in error."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failed: EnvelopeError | None = None

    def feed(self, data: bytes | bytearray) -> list[Frame]:
        """The frames completed by `data`. Raises EnvelopeError `oversize` or `malformed`."""
        if self._failed is not None:
            raise self._failed
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        at, end = 0, len(buffer)
        while end - at >= HEADER_BYTES:
            number, lane, size = _HEADER.unpack_from(buffer, at)
            kind = self._checked(number, size)
            if end - at < HEADER_BYTES + size:
                break
            start = at + HEADER_BYTES
            at = start + size
            frames.append(Frame(kind, lane, bytes(buffer[start:at]) if size else b""))
        if at:
            del buffer[:at]
        return frames

    def _checked(self, number: int, size: int) -> Kind:
        kind = _KINDS.get(number)
        if kind is None:
            raise self._fail("malformed", f"A link frame of unknown kind {number}.")
        least, most = _SIZES.get(kind, (0, 0))
        if not least <= size <= most:
            code = "oversize" if size > most else "malformed"
            raise self._fail(code, f"A {kind.name} frame of {size} bytes.")
        return kind

    def _fail(self, code: str, message: str) -> EnvelopeError:
        self._failed = EnvelopeError(code, message)
        return self._failed


# --- the JSON of a connection's beginning --------------------------------------------------------

_Secret = Annotated[str, Meta(min_length=32, max_length=64, pattern="^[0-9a-f]+$")]
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a direct listener can be dialled."""

    ip: Annotated[str, Meta(max_length=45)]
    port: Annotated[int, Meta(ge=1, le=65535)]


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A direct listener and the one-time token that opens this link there."""

    addresses: Annotated[tuple[Address, ...], Meta(max_length=ADDRESSES_MAX)]
    pin: Annotated[str, Meta(min_length=64, max_length=64, pattern="^[0-9a-f]+$")]
    token: _Secret

    def target(self) -> DirectTarget:
        """The listener without the token."""
        return DirectTarget(tuple((item.ip, item.port) for item in self.addresses), self.pin)


class Attach(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Said by the side that dialled. `proof` is the link's secret inside the overlay, the token
    on a direct connection; `fresh` begins the link."""

    version: Annotated[int, Meta(ge=1, le=1)] = 1
    link: _Secret
    proof: _Secret
    fresh: bool = False


class Attached(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer: counted frames received so far, and where to dial next time."""

    received: _Count
    target: Target | None = None


class Resumed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The dialler's counted frames received so far."""

    received: _Count


_Serves = Annotated[
    tuple[Annotated[str, Meta(max_length=NAME_CHARS_MAX)], ...], Meta(max_length=LINK_PROTOCOLS_MAX)
]
T = TypeVar("T")


def encode_json(kind: Kind, body: object) -> bytes:
    """A frame whose body is JSON."""
    return encode(kind, 0, msgspec.json.encode(body))


def decode_json(frame: Frame, kind: Kind, type_: type[T]) -> T:
    """The JSON of a frame that must be of `kind`. Raises EnvelopeError `malformed`."""
    if frame.kind != kind:
        raise EnvelopeError("malformed", f"A {frame.kind.name} frame came instead of {kind.name}.")
    try:
        return msgspec.json.decode(frame.body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError("malformed", f"A bad {kind.name} frame: {error}") from None


def encode_serves(protocols: tuple[str, ...]) -> bytes:
    """The frame that says which protocols are answered."""
    return encode_json(Kind.SERVES, protocols[:LINK_PROTOCOLS_MAX])


def decode_serves(frame: Frame) -> frozenset[str]:
    """The protocols that the other side answers."""
    return frozenset(decode_json(frame, Kind.SERVES, _Serves))
