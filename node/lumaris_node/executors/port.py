"""The executor port: what a tier must do to run one order of a stranger.

A job's life on a tier is prepare -> start -> wait -> destroy. `prepare` fetches and checks (never
billed), `start` begins the billed run, `destroy` is idempotent and always reached. Failures that
are the guest's own doing are an Outcome; failures of this machine are LumarisError.

Orders of one lease (one buyer, one agreement) may share what is kept warm for it; `release` ends
that. What a tier cannot do raises LumarisError `not_supported`, and the tier does not name the
feature in its probe.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Runtime

Stream = Literal["stdout", "stderr"]
# Receives guest output in order as it appears: (stream, bytes). Called in the trio loop.
LogSink = Callable[[Stream, bytes], Awaitable[None]]
# Bytes and files that the job has on its scratch file system now; does not block for long.
DiskUse = Callable[[], tuple[int, int]]
# How far a long preparation is: what it is, done, total (bytes; 0 of 0 when not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class JobLimits:
    """What one job may use. Already capped by the agreement and the seller's own settings."""

    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    wall_s: float
    fuel: int
    log_bytes: int
    output_bytes: int
    output_files: int
    pids: int = limits.PIDS_DEFAULT
    open_files: int = limits.OPEN_FILES_MAX
    file_bytes: int = limits.FILE_BYTES_MAX
    scratch_files: int = limits.SCRATCH_FILES_MAX


@dataclass(frozen=True)
class JobSpec:
    """One order, as an executor sees it. `job` and `lease` are our own ids and safe in a path.

    Orders with the same `lease` belong to one buyer and come one after another, with the same
    `inputs`, `outputs`, `egress`, `gpus` and at most the first one's limits; "" shares with no one.
    """

    job: str
    image: str  # sha256:<hex> of a wasm module, or of a container image's configuration
    command: tuple[str, ...]
    environment: dict[str, str]
    inputs: Path  # read-only for the guest, mounted as /in
    outputs: Path  # writable for the guest, mounted as /out
    limits: JobLimits
    lease: str = ""
    stdin: bool = False  # standard input stays open for `write_stdin`; else it is empty
    gpus: tuple[str, ...] = ()  # the UUIDs of the GPUs that are this lease's
    mounts: tuple[tuple[Path, str], ...] = ()  # further read-only folders; for the self-test only
    disk_use: DiskUse | None = None  # None: the tier walks `outputs` itself


@dataclass(frozen=True)
class Usage:
    """What a run consumed, from the kernel or the runtime, never from the guest."""

    wall_ms: int = 0
    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    fuel: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `reason` is a code of `lumaris_protocol.codes` for a job's end.

    `succeeded` and `exit_nonzero` carry the exit status; killed_* and `cancelled` do not.
    """

    reason: str
    exit_status: int | None
    usage: Usage
    detail: str = ""


@dataclass
class Handle:
    """A prepared or running job on a tier; `private` belongs to the executor."""

    spec: JobSpec
    private: dict[str, object] = field(default_factory=dict)


class Attachment(Protocol):
    """A further command inside a running sandbox. Closing it kills the command."""

    async def send(self, data: bytes) -> None:
        """Bytes for its standard input."""
        ...

    async def send_eof(self) -> None:
        """End its standard input."""
        ...

    async def receive(self) -> tuple[Stream, bytes] | None:
        """Its next output; None after the last. With a terminal everything is `stdout`."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal another size; without a terminal nothing happens."""
        ...

    async def exit_status(self) -> int:
        """Its exit status, once `receive` has returned None."""
        ...

    async def aclose(self) -> None:
        """Kill it if it runs, and free everything."""
        ...


class Executor(Protocol):
    """A tier. All methods are called from trio; blocking work goes to threads or processes."""

    tier: str
    # Why the last probe returned None, for the owner; "" while it returned a runtime.
    why_not: str

    async def probe(self) -> Runtime | None:
        """The runtime to advertise after really running something, or None when unavailable."""
        ...

    async def has_image(self, image: str) -> bool:
        """Whether the image is here, without fetching."""
        ...

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        """Take in an image: a wasm module, or an archive as `images.archive` describes.

        Raises LumarisError `bad_image`.
        """
        ...

    async def images(self) -> tuple[str, ...]:
        """Digests of the images held here, most useful first, for the advert."""
        ...

    async def remove_image(self, image: str) -> None:
        """Forget an image that no job uses; one that is not here is no error."""
        ...

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        """Make everything ready to start. Raises LumarisError (`bad_image`, `platform_error`)."""
        ...

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Begin the run. Raises LumarisError (`bad_command`, `platform_error`)."""
        ...

    async def wait(self, handle: Handle) -> Outcome:
        """Until the run has ended and all its output went to the log; enforces every limit.

        Cancelling this call leaves the job running; `cancel` or `destroy` ends it.
        """
        ...

    async def usage(self, handle: Handle) -> Usage:
        """What the run consumed so far."""
        ...

    async def pause(self, handle: Handle) -> None:
        """Freeze the run; its wall clock stops."""
        ...

    async def resume(self, handle: Handle) -> None:
        """Continue a frozen run."""
        ...

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        """End the run: ask it to (SIGTERM), kill it `grace_s` later; 0 kills now.

        Returns at once; `wait` then returns an Outcome with this reason, however it ended.
        """
        ...

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        """Bytes for the guest's standard input, b"" to end it; waits while the guest is behind.

        Raises LumarisError `not_attached` when the run or its input has ended.
        """
        ...

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Attachment:
        """Run another command in the sandbox of a running job.

        Raises LumarisError `not_supported`, `not_attached`, `bad_command`.
        """
        ...

    async def network_pid(self, handle: Handle) -> int:
        """A process of this machine whose network namespace is the sandbox's, from `prepare` on.

        Raises LumarisError `not_supported`, `not_attached`.
        """
        ...

    async def destroy(self, handle: Handle) -> None:
        """Free everything the job holds on this tier. Idempotent, never raises for a gone job.

        What the lease keeps warm stays, with no process of this job in it.
        """
        ...

    async def release(self, lease: str) -> None:
        """The lease is over: destroy what is kept warm for it. Idempotent."""
        ...

    async def reap_orphans(self) -> int:
        """Destroy what a killed predecessor of this node left behind; how many there were."""
        ...

    async def reap_left(self) -> int:
        """Destroy what an engine that went away kept of jobs that are over; how many there were.

        Unlike `reap_orphans` it may be called while jobs run.
        """
        ...

    async def aclose(self) -> None:
        """Stop the tier itself: no process of it is left."""
        ...
