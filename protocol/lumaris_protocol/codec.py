"""From a message to signed bytes, and back with every check in one order.

Order on the way in: size, envelope form, type, signer, signature, fields. The cheap checks come
first, so a stranger pays more for a bad document than we do.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec

from lumaris_protocol import envelope
from lumaris_protocol.envelope import Envelope
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.ids import digest
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.base import Message

M = TypeVar("M", bound=Message)

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True)
class Signed(Generic[M]):
    """A verified document: its message, who signed it, and the exact bytes that were signed."""

    message: M
    signer: PeerId
    data: bytes

    @property
    def hash(self) -> str:
        """The document's name: `sha256:` of the envelope's bytes."""
        return digest(self.data)


def encode_payload(message: Message) -> bytes:
    """The JSON bytes of a message, as they are signed."""
    return _ENCODER.encode(message)


def sign(message: M, key: KeyPair, network: str) -> Signed[M]:
    """Sign a message. Raises ValueError when its type does not allow it: our own bug.

    What the other side would refuse for a size or a bound is found here, before it is promised.
    """
    payload = encode_payload(message)
    try:
        _decoder(type(message)).decode(payload)
    except msgspec.ValidationError as error:
        raise ValueError(f"a {message.TYPE} that breaks its own bounds: {error}") from None
    data = envelope.seal(key, network, message.TYPE, payload)
    if len(data) > message.SIZE_MAX:
        raise ValueError(f"a {message.TYPE} of {len(data)} bytes exceeds {message.SIZE_MAX}")
    return Signed(message, key.peer_id, data)


def open_signed(
    data: bytes,
    kind: type[M],
    *,
    network: str,
    signer: str | None = None,
    known: Collection[bytes] = (),
) -> Signed[M]:
    """Check a document of a known type and take its message out.

    With `signer` the document must come from that peer. Expiry is the caller's next check
    (`check_times`), since only it knows the time. Of the `known` documents the caller says that
    their signatures were checked before, for this network. Raises EnvelopeError.
    """
    found = envelope.decode(data, size_max=kind.SIZE_MAX)
    return open_decoded(found, kind, network=network, signer=signer, known=known)


def open_decoded(
    found: Envelope,
    kind: type[M],
    *,
    network: str,
    signer: str | None = None,
    known: Collection[bytes] = (),
) -> Signed[M]:
    """`open_signed` of an envelope that was taken apart to learn its type."""
    check_envelope(found, kind, network=network, signer=signer, known=known)
    return Signed(decode_payload(found.payload, kind), found.signer, found.data)


def check_envelope(
    found: Envelope,
    kind: type[Message],
    *,
    network: str,
    signer: str | None = None,
    known: Collection[bytes] = (),
) -> None:
    """Everything that `open_decoded` checks before the payload. Raises EnvelopeError."""
    if len(found.data) > kind.SIZE_MAX:
        raise EnvelopeError("oversize", f"A {kind.TYPE} of {len(found.data)} bytes is too large.")
    if found.payload_type != kind.TYPE:
        raise EnvelopeError(
            "wrong_type", f"A {kind.TYPE} was expected, not a {found.payload_type}."
        )
    if signer is not None and found.signer != signer:
        raise EnvelopeError("wrong_signer", f"The {kind.TYPE} is signed by {found.signer}.")
    if found.data not in known:
        found.verify(network)


def decode_payload(payload: bytes, kind: type[M]) -> M:
    """The message of a payload. Raises EnvelopeError: `unknown_field` or `malformed`.

    A repeated key is refused: of two values under one key, readers differ on which one was signed.
    """
    try:
        message: M = _decoder(kind).decode(payload)
        # Our own encoder writes each key once, so only other spellings need the slower look.
        if _ENCODER.encode(message) != payload:
            json.loads(payload, object_pairs_hook=_unique)
        return message
    except msgspec.ValidationError as error:
        raise EnvelopeError("unknown_field", f"{kind.TYPE}: {error}") from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise EnvelopeError("malformed", f"The {kind.TYPE} is not valid JSON.") from None


def check_times(*, issued_at: int, expires_at: int, now: float, what: str) -> None:
    """Refuse a document outside its validity, allowing for clocks 60 s apart.

    Raises EnvelopeError: `not_yet_valid`, `expired`, or `malformed` when it ends before it begins.
    """
    if expires_at < issued_at:
        raise EnvelopeError("malformed", f"The {what} expires before it is issued.")
    if issued_at > now + CLOCK_SKEW_S:
        raise EnvelopeError("not_yet_valid", f"The {what} is dated {issued_at - now:.0f} s ahead.")
    if expires_at < now - CLOCK_SKEW_S:
        raise EnvelopeError("expired", f"The {what} expired {now - expires_at:.0f} s ago.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


@cache
def _decoder(kind: type[M]) -> msgspec.json.Decoder[M]:
    return msgspec.json.Decoder(kind, strict=True)
