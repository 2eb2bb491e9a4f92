"""What all messages share: frozen, strict, bounded field types and the registry of types."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.ids import DIGEST_PATTERN, ID_PATTERN

Id = Annotated[str, Meta(pattern=ID_PATTERN)]
Digest = Annotated[str, Meta(pattern=DIGEST_PATTERN)]
Peer = Annotated[str, Meta(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]
Name = Annotated[
    str, Meta(max_length=limits.NAME_CHARS_MAX, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]*\Z")
]
Text = Annotated[str, Meta(max_length=limits.REASON_CHARS_MAX)]
Time = Annotated[int, Meta(ge=0, le=1 << 40)]
Seconds = Annotated[int, Meta(ge=0, le=limits.SETTLE_WINDOW_S_MAX)]
Amount = Annotated[int, Meta(ge=0, le=limits.NANOS_MAX)]
Count = Annotated[int, Meta(ge=0, le=limits.SEQ_MAX)]
Currency = Annotated[str, Meta(pattern=r"^[A-Z]{3,8}\Z")]
Nonce = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Address = Annotated[str, Meta(max_length=limits.ADDRESS_CHARS_MAX)]
# A nested signed document, base64 in JSON.
Document = Annotated[bytes, Meta(max_length=limits.ENVELOPE_BYTES_MAX)]
SmallDocument = Annotated[bytes, Meta(max_length=limits.ADVERT_BYTES_MAX)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A record inside a message."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A signed statement. `TYPE` is the envelope's payload type and part of what is signed."""

    TYPE: ClassVar[str]
    SIZE_MAX: ClassVar[int] = limits.ENVELOPE_BYTES_MAX


class SessionMessage(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A statement inside a session: chained to its signer's previous one, so a fork is provable.

    `seq` counts from 0 per signer; `prev` is the hash of that signer's previous envelope in this
    session, and of the agreement's payload for the first one.
    """

    session: Id
    seq: Count
    prev: Digest
