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
ATTACH: Final = "/lumaris/attach/1"  # a running order: log, input, commands, ports
CONTENT: Final = "/lumaris/content/1"  # images and modules by hash, between sellers
CHALLENGE: Final = "/lumaris/challenge/1"  # proof of cores and memory
WITNESS: Final = "/lumaris/witness/1"  # the receipts log's head, to be cosigned
NOTICES: Final = "/lumaris/notices/1"  # what coordinators tell everybody, for newcomers


# Which stream the bytes of a DATA frame are: its first byte.
LOG_STREAMS: Final[dict[int, Literal["stdout", "stderr"]]] = {1: "stdout", 2: "stderr"}


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


class AttachHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Opens a stream to a running order; only the session's buyer may.

    `log` gets the order's log from `offset` on and follows it (DATA frames, each a stream byte and
    its bytes; END after the last). `stdin` sends its standard input (DATA; END closes it). `exec`
    runs another command in its sandbox, with a terminal if `tty`; its output is framed like a log.
    `forward` joins a port inside: DATA both ways, END from each side that has no more. Port 0 joins
    nothing: the answer says whether the order has ports.
    """

    session: Id
    n: Annotated[int, Meta(ge=1, le=limits.SEQ_MAX)]
    op: Literal["log", "stdin", "exec", "forward"]
    offset: Annotated[int, Meta(ge=0, le=limits.SEQ_MAX)] = 0
    command: Annotated[
        tuple[Annotated[str, Meta(max_length=limits.ARGUMENT_CHARS_MAX)], ...],
        Meta(max_length=limits.ARGUMENTS_MAX),
    ] = ()
    tty: bool = False
    rows: Annotated[int, Meta(ge=0, le=10_000)] = 0
    columns: Annotated[int, Meta(ge=0, le=10_000)] = 0
    port: Annotated[int, Meta(ge=0, le=65_535)] = 0


class AttachReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Attached; or, as the last frame of `exec`, its exit status."""

    state: Literal["ready", "exited"]
    exit_status: Annotated[int, Meta(ge=0, le=255)] = 0


class Resize(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The terminal of an `exec` changed its size: a HEADER frame between its DATA frames."""

    rows: Annotated[int, Meta(ge=1, le=10_000)]
    columns: Annotated[int, Meta(ge=1, le=10_000)]


class ContentHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks another seller for an image's parts (`parts`), or for one file by its hash (`get`)."""

    op: Literal["parts", "get"]
    digest: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=limits.FILE_BYTES_MAX)] = 0
    direct: bool = False
    listed: bool = False


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of an image: its hash, and its size as it is kept."""

    digest: Digest
    size_bytes: Annotated[int, Meta(ge=0, le=limits.IMAGE_BYTES_MAX)]


class ContentParts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Answers `parts`: the module, or the configuration and then the layers, the lowest first."""

    parts: Annotated[tuple[ContentPart, ...], Meta(min_length=1, max_length=limits.LAYERS_MAX + 1)]
