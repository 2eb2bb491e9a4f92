"""What is said over the overlay's Unix socket.

Every connection opens with one HEADER frame, a `Request`; the answer is a HEADER frame, a `Reply`,
or a REFUSAL with a code. `open` and `accept` then turn the connection into the raw bytes of one
stream, copied without further framing. `serve`, `adverts`, `demands` and `notices` go on with one
HEADER per inbound stream, change, demand or notice, for as long as the connection lasts; `attach`
only stays open. All other operations end with their reply.

A raw pipe cannot say whether its end was the peer's end of stream or a lost connection, so the
server remembers for each stream how it ended and `ended` asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio
from msgspec import Meta

from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.ports import Verdict
from lumaris_protocol import codes, frames
from lumaris_protocol.errors import EnvelopeError, LumarisError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    ADDRESS_CHARS_MAX,
    NOTICE_BYTES_MAX,
    PEERS_REMEMBERED_MAX,
    SOCKET_HEADER_BYTES_MAX,
)
from lumaris_protocol.messages.negotiation import Requirements

Operation = Literal[
    "accept", "adverts", "attach", "connect", "demand", "demands", "ended", "find", "identity",
    "notice", "notices", "open", "peers", "ping", "present", "publish", "reachability", "reset",
    "seek", "serve", "shards", "shutdown",
]  # fmt: skip

# sun_path holds 108 bytes with its final zero.
PATH_BYTES_MAX = 107


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a client wants of the overlay process."""

    op: Operation
    peer: Annotated[str, Meta(max_length=64)] = ""
    protocol: Annotated[str, Meta(max_length=64)] = ""
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=ADDRESS_CHARS_MAX)], ...],
        Meta(max_length=PEERS_REMEMBERED_MAX),
    ] = ()
    envelope: Annotated[bytes, Meta(max_length=NOTICE_BYTES_MAX)] = b""
    needs: Requirements | None = None
    token: Annotated[str, Meta(max_length=32)] = ""
    id: int = 0


class PeerItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One connected peer in a reply."""

    peer: str
    addresses: tuple[str, ...] = ()
    relayed: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the overlay process answers; each operation fills its own fields."""

    peer: str = ""
    network: str = ""
    coordinator_keys: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    token: str = ""
    id: int = 0
    clean: bool = False
    count: int = 0
    addresses: tuple[str, ...] = ()
    peers: tuple[PeerItem, ...] = ()
    seller: str = ""
    seq: int = 0
    envelope: bytes | None = None
    kind: str = ""
    verdict: Verdict = "unknown"
    confirmed_by: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    relayed: bool = False
    round_trip_s: float = 0.0
    clock_offset_s: float = 0.0


_REQUEST = msgspec.json.Decoder(Request)
_REPLY = msgspec.json.Decoder(Reply)


def socket_path(path: Path) -> str:
    """The path as the kernel takes it. Raises LumarisError `config_invalid` when too long."""
    text = str(path)
    if len(text.encode()) > PATH_BYTES_MAX:
        raise LumarisError(
            "config_invalid",
            f"The socket path has {len(text.encode())} bytes; {PATH_BYTES_MAX} fit: {text}",
            hint="Use a shorter state directory.",
        )
    return text


def encode(message: Request | Reply) -> bytes:
    """The frame of a request or reply."""
    return frames.encode(Kind.HEADER, msgspec.json.encode(message))


def encode_refusal(error: LumarisError) -> bytes:
    """The frame that says no."""
    return frames.encode(Kind.REFUSAL, msgspec.json.encode(error.to_json()))


async def read_header(stream: trio.abc.ReceiveStream) -> frames.Frame:
    """The one frame that opens a connection, and not a byte more: raw bytes may follow it.

    Raises EnvelopeError.
    """
    head = await _read_exactly(stream, 4)
    size = int.from_bytes(head, "big")
    if not 1 <= size <= SOCKET_HEADER_BYTES_MAX:
        raise EnvelopeError("oversize", f"A header of {size} bytes.")
    found = frames.Decoder(size_max=SOCKET_HEADER_BYTES_MAX).feed(
        head + await _read_exactly(stream, size)
    )
    return found[0]


def decode_request(frame: frames.Frame) -> Request:
    """The request in a frame. Raises EnvelopeError."""
    if frame.kind != Kind.HEADER:
        raise EnvelopeError("malformed", "A request must be a HEADER frame.")
    try:
        return _REQUEST.decode(frame.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError("unknown_field", f"The request is not understood: {error}") from None


def decode_reply(frame: frames.Frame | None) -> Reply:
    """The reply in a frame. Raises what the server refused with, or EnvelopeError."""
    if frame is None:
        raise EnvelopeError("truncated", "The overlay process went away.")
    if frame.kind == Kind.REFUSAL:
        raise _refusal(frame.body)
    try:
        return _REPLY.decode(frame.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EnvelopeError("malformed", f"The reply is not understood: {error}") from None


def reply_reader(stream: trio.abc.ReceiveStream) -> FrameReader:
    """Reads the replies of a connection that only ever carries frames."""
    return FrameReader(stream)


# A refusal about a document is an EnvelopeError on this side as well, as the port promises.
_ENVELOPE_CODES = frozenset(
    {
        "malformed", "oversize", "bad_signature", "wrong_domain", "wrong_type", "wrong_signer",
        "unknown_field", "expired", "not_yet_valid", "not_certified", "directory_full",
        "map_invalid", "map_stale", "revoked",
    }
)  # fmt: skip


def _refusal(body: bytes) -> LumarisError:
    try:
        said = msgspec.json.decode(body, type=dict[str, str | bool])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return EnvelopeError("malformed", "The refusal is not understood.")
    code = str(said.get("code", ""))
    if code not in codes.CODES:
        code = "internal"
    kind = EnvelopeError if code in _ENVELOPE_CODES else RemoteError
    return kind(code, str(said.get("message", "")), hint=str(said.get("hint", "")))


async def _read_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < size:
        data = await stream.receive_some(size - len(buffer))
        if not data:
            raise EnvelopeError("truncated", "The connection ended inside its header.")
        buffer += data
    return bytes(buffer)
