"""Names and headers of the protocols spoken on overlay streams."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Digest, Id

NEGOTIATE: Final = "/lumaris/negotiate/1"
SESSION: Final = "/lumaris/session/1"
BLOB: Final = "/lumaris/blob/1"
INDEX: Final = "/lumaris/index/1"


class BlobHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Opens a blob stream: send a file to the seller, or get one, inside a session."""

    session: Id
    op: Literal["put", "get"]
    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=limits.FILE_BYTES_MAX)]


class BlobReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Go on (`ready`), or done (`stored`)."""

    state: Literal["ready", "stored"]
