"""The executor port: what a tier must do to run one order of a stranger.

A job's life on a tier is prepare -> start -> wait -> collect -> destroy. `prepare` fetches and
checks (never billed), `start` begins the billed run, `destroy` is idempotent and always reached.
Failures that are the guest's own doing are an Outcome; failures of this machine are LumarisError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lumaris_protocol.messages.advert import Runtime

Stream = Literal["stdout", "stderr"]
# Receives guest output in order as it appears: (stream, bytes). Called in the trio loop.
LogSink = Callable[[Stream, bytes], Awaitable[None]]


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
    pids: int = 64


@dataclass(frozen=True)
class JobSpec:
    """One order, as an executor sees it. `job` is our own id and safe in a path."""

    job: str
    image: str  # sha256:<hex> of a wasm module or of a container image
    command: tuple[str, ...]
    environment: dict[str, str]
    inputs: Path  # read-only for the guest, mounted as /in
    outputs: Path  # writable for the guest, mounted as /out
    limits: JobLimits


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


class Executor(Protocol):
    """A tier. All methods are called from trio; blocking work goes to threads or processes."""

    tier: str

    async def probe(self) -> Runtime | None:
        """The runtime to advertise after really running something, or None when unavailable."""
        ...

    async def has_image(self, image: str) -> bool:
        """Whether the image is here, without fetching."""
        ...

    async def add_image(self, image: str, source: Path) -> None:
        """Take in an image from a file the buyer sent. Raises LumarisError `bad_image`."""
        ...

    async def images(self) -> tuple[str, ...]:
        """Digests of the images held here, most useful first, for the advert."""
        ...

    async def prepare(self, spec: JobSpec) -> Handle:
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

    async def pause(self, handle: Handle) -> None:
        """Freeze the run; its wall clock stops."""
        ...

    async def resume(self, handle: Handle) -> None:
        """Continue a frozen run."""
        ...

    async def cancel(self, handle: Handle, reason: str) -> None:
        """End the run now; `wait` then returns an Outcome with this reason."""
        ...

    async def destroy(self, handle: Handle) -> None:
        """Free everything the job holds on this tier. Idempotent, never raises for a gone job."""
        ...

    async def reap_orphans(self) -> int:
        """Destroy what a killed predecessor of this node left behind; how many there were."""
        ...

    async def aclose(self) -> None:
        """Stop the tier itself: no process of it is left."""
        ...
