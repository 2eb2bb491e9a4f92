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
HELLO: Final = "/lumaris/hello/1"
INDEX: Final = "/lumaris/index/1"
REACH: Final = "/lumaris/reach/1"
LINK: Final = "/lumaris/link/1"
TENDER: Final = "/lumaris/tender/1"


BulkToken = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class BlobHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Opens a blob stream: send a file to the seller, or get one, inside a session."""

    session: Id
    op: Literal["put", "get"]
    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=limits.FILE_BYTES_MAX)]
    direct: bool = False  # the sender may dial the other program for the bytes
    listed: bool = False  # get: the hashes of the file's beginnings follow the answer


class BlobReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Go on (`ready`), or done (`stored`)."""

    state: Literal["ready", "stored"]
    # put: the chunks that the receiver holds from an earlier attempt
    first: Annotated[int, Meta(ge=0, le=limits.FILE_BYTES_MAX // limits.CHUNK_BYTES)] = 0
    token: BulkToken | None = None  # for one bulk connection, when `direct` was asked


class TenderHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Opens a tender: which demand the advert in the next frame answers."""

    demand: Id
