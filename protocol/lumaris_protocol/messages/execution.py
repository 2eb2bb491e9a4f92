"""Work and its results, inside a session."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Amount,
    Count,
    Digest,
    Document,
    Id,
    Part,
    SessionMessage,
    Text,
    Time,
)

FilePath = Annotated[str, Meta(min_length=1, max_length=limits.PATH_CHARS_MAX)]
Argument = Annotated[str, Meta(max_length=limits.ARGUMENT_CHARS_MAX)]
# registry host and port, repository, manifest digest
ImageSource = Annotated[
    str,
    Meta(
        max_length=limits.IMAGE_SOURCE_CHARS_MAX,
        pattern=r"^([a-z0-9.-]+(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+@sha256:[0-9a-f]{64})?\Z",
    ),
]
LogBytes = Annotated[bytes, Meta(max_length=limits.LOG_CHUNK_BYTES_MAX)]
OrderNumber = Annotated[int, Meta(ge=1, le=limits.SEQ_MAX)]
ExitStatus = Annotated[int, Meta(ge=0, le=255)]
WorkState = Literal[
    "accepted", "preparing", "running", "paused", "collecting", "failed", "killed", "error"
]


class File(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of an input or output tree; `path` is relative, with `/` between its parts."""

    path: FilePath
    size_bytes: Annotated[int, Meta(ge=0, le=limits.FILE_BYTES_MAX)]
    sha256: Digest


class Limits(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one order may use at most. Time counts from `running`; fuel only on wasm.

    `cost_nanos` is the most this one order may cost; 0 leaves it to the session's cap. `pids`
    counts processes and threads together.
    """

    cost_nanos: Amount = 0

    wall_s: Annotated[int, Meta(ge=1, le=limits.WALL_S_MAX)]
    memory_bytes: Annotated[int, Meta(ge=limits.MIB, le=limits.MEMORY_BYTES_MAX)]
    disk_bytes: Annotated[int, Meta(ge=0, le=limits.OUTPUT_BYTES_MAX)]
    fuel: Annotated[int, Meta(ge=0, le=limits.FUEL_MAX)]
    log_bytes: Annotated[int, Meta(ge=0, le=limits.LOG_BYTES_MAX)]
    output_files: Annotated[int, Meta(ge=0, le=limits.OUTPUT_FILES_MAX)]
    pids: Annotated[int, Meta(ge=1, le=limits.PIDS_MAX)] = limits.PIDS_DEFAULT


class Usage(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an order consumed, measured by the seller's kernel or runtime."""

    wall_ms: Count = 0
    cpu_ms: Count = 0
    memory_peak_bytes: Count = 0
    fuel: Count = 0
    gpu_ms: Count = 0  # time in which a kernel of any process ran, summed over the GPUs
    vram_peak_bytes: Count = 0


class SessionOpen(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer's first word in a session: the coordinator's grant for it."""

    TYPE: ClassVar[str] = "session_open"
    agreement_hash: Digest
    grant: Document


class SessionReady(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The seller took the grant; orders may follow."""

    TYPE: ClassVar[str] = "session_ready"
    agreement_hash: Digest


class WorkOrder(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Run this. `n` counts from 1; an order with a known idempotency key is not run twice.

    `image_source` says where the image may be pulled from, as `registry/repository@sha256:…`; what
    is pulled counts only when its content is the image's. With `stdin` the guest's standard input
    stays open until the buyer ends it over `/lumaris/attach/1`; without it, it is empty.
    """

    TYPE: ClassVar[str] = "work_order"
    SIZE_MAX: ClassVar[int] = 4 * limits.ENVELOPE_BYTES_MAX - limits.KIB
    n: OrderNumber
    job: Id
    image: Digest
    image_source: ImageSource = ""
    stdin: bool = False
    command: Annotated[tuple[Argument, ...], Meta(min_length=1, max_length=limits.ARGUMENTS_MAX)]
    environment: Annotated[dict[Argument, Argument], Meta(max_length=limits.ENVIRONMENT_MAX)] = (
        field(default_factory=dict)
    )
    inputs: Annotated[tuple[File, ...], Meta(max_length=limits.INPUT_FILES_MAX)] = ()
    input_root: Digest
    limits: Limits
    idempotency_key: Id


class JobEvent(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An order changed its state. `missing` names input hashes the buyer must send.

    `order_hash` is the WorkOrder's hash: what is said of an order is said of one signed text.
    While an image is fetched or compiled, `done` of `total` says how far that is (bytes; 0 of 0
    when not known) and `detail` what it is.
    """

    TYPE: ClassVar[str] = "job_event"
    SIZE_MAX: ClassVar[int] = 4 * limits.ENVELOPE_BYTES_MAX - limits.KIB
    n: OrderNumber
    order_hash: Digest
    state: WorkState
    reason: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)] = ""
    detail: Text = ""
    exit_status: ExitStatus | None = None
    # The inputs, and the module itself when it is a file of the buyer's.
    missing: Annotated[tuple[Digest, ...], Meta(max_length=limits.INPUT_FILES_MAX + 1)] = ()
    usage: Usage = Usage()
    done: Count = 0
    total: Count = 0
    at: Time


class LogChunk(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Output of a running order; `offset` counts the bytes of its stream."""

    TYPE: ClassVar[str] = "log_chunk"
    n: OrderNumber
    stream: Literal["stdout", "stderr"]
    offset: Count
    data: LogBytes


class Meter(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the running order has cost so far; informational, never summed."""

    TYPE: ClassVar[str] = "meter"
    n: OrderNumber
    amount_nanos: Amount
    usage: Usage


class Delivery(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The order succeeded: its outputs by hash, its log by hash, its price.

    `order_hash` is the WorkOrder's hash: a result means nothing for another order of this number.
    """

    TYPE: ClassVar[str] = "delivery"
    SIZE_MAX: ClassVar[int] = 4 * limits.ENVELOPE_BYTES_MAX - limits.KIB
    n: OrderNumber
    order_hash: Digest
    exit_status: ExitStatus
    outputs: Annotated[tuple[File, ...], Meta(max_length=limits.OUTPUT_FILES_MAX)]
    output_root: Digest
    stdout: File
    stderr: File
    usage: Usage
    amount_nanos: Amount
    environment: Digest


class Acceptance(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer took the delivery, or rejects it with a code; `total_nanos` is what it owes now."""

    TYPE: ClassVar[str] = "acceptance"
    SIZE_MAX: ClassVar[int] = limits.MONEY_BYTES_MAX
    n: OrderNumber
    accepted: bool
    reason: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)] = ""
    total_nanos: Amount


class Cancel(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer stops an order; it ends as `cancelled` and costs what was vouchered.

    The guest is asked to end (SIGTERM) and killed `grace_s` later; 0 kills at once.
    """

    TYPE: ClassVar[str] = "cancel"
    SIZE_MAX: ClassVar[int] = limits.MONEY_BYTES_MAX
    n: OrderNumber
    grace_s: Annotated[int, Meta(ge=0, le=limits.GRACE_S_MAX)] = 0
