"""What a buyer asks for, and what comes back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Feature, Gpu, Tier
from lumaris_protocol.money import Nanos, format_credits

Stream = Literal["stdout", "stderr"]

_DEFAULT_WALL_S = 600
_DEFAULT_MEMORY_BYTES = 512 * limits.MIB
_DEFAULT_DISK_BYTES = 64 * limits.MIB
_DEFAULT_LOG_BYTES = limits.MIB  # kept in memory until the result is taken
_DEFAULT_FUEL = 1 << 50  # about two weeks of one core: the wall clock ends a job long before


@dataclass(frozen=True)
class JobRequest:
    """One run: an image, a command, files in, and what it may use.

    `inputs` maps paths in the guest's /in to local files. Everything the guest leaves in /out
    comes back as artifacts. `max_cost_nanos` is what the job may cost over all its attempts.
    `egress` names each `host:port` that the job may connect to, through an HTTP proxy that its
    environment names; without it there is no network. `gpus` are wanted whole; `assurances` are the
    kinds of isolation that will do, any when empty. `pids` counts processes and threads. With
    `stdin` the job's standard input stays open until it is ended; `features` are what the seller's
    runtime must offer besides (`exec`, `forward`).
    """

    image: str
    command: tuple[str, ...]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    cpu_millis: int = 1000
    memory_bytes: int = _DEFAULT_MEMORY_BYTES
    disk_bytes: int = _DEFAULT_DISK_BYTES
    wall_s: int = _DEFAULT_WALL_S
    fuel: int = _DEFAULT_FUEL
    log_bytes: int = _DEFAULT_LOG_BYTES
    max_cost_nanos: int = 10_000_000
    pids: int = limits.PIDS_DEFAULT
    egress: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    assurances: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    stdin: bool = False
    features: tuple[Feature, ...] = ()
    attempts: int = 3
    tier: Tier | None = None  # where a container image is to run: `container` if not said


@dataclass(frozen=True)
class Artifact:
    """A delivered file, already checked against its hash."""

    path: str
    file: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobResult:
    """How a job ended. `cost_nanos` is what was paid for this job, fee included."""

    job: str
    session: str
    seller: str
    reason: str
    exit_status: int | None
    stdout: bytes
    stderr: bytes
    artifacts: Mapping[str, Artifact]
    cost_nanos: Nanos
    wall_ms: int
    cpu_ms: int
    fuel: int
    attempts: int = 1
    detail: str = ""
    memory_peak_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether it succeeded and was delivered."""
        return self.reason == "succeeded"

    @property
    def cost(self) -> str:
        """The cost in credits, exact."""
        return format_credits(self.cost_nanos)


def not_run(job: str, error: LumarisError) -> JobResult:
    """The result of a job that never reached a seller."""
    return JobResult(
        job=job,
        session="",
        seller="",
        reason=error.code,
        exit_status=None,
        stdout=b"",
        stderr=b"",
        artifacts={},
        cost_nanos=Nanos(0),
        wall_ms=0,
        cpu_ms=0,
        fuel=0,
        detail=error.message,
    )


@dataclass(frozen=True)
class JobUpdate:
    """A change of a job while it is under way.

    While an image is fetched or unpacked, `detail` says what is, and `done` of `total` bytes how
    far that is (0 of 0 when not known).
    """

    job: str
    state: str
    seller: str = ""
    detail: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class LogLine:
    """Output as it arrives; not necessarily a whole line."""

    job: str
    stream: Stream
    data: bytes


# The next bytes of a job's standard input; b"" at their end.
Source = Callable[[], Awaitable[bytes]]
Observer = Callable[[JobUpdate | LogLine], None]


def ignore(_: JobUpdate | LogLine) -> None:
    """The observer that looks away."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost, before a nano is spent: a seller's signed quote."""

    seller: str
    region: str
    quote: str
    rate_nanos_per_s: int
    start_nanos: int
    cap_nanos: int
    currency: str
    hold_until: int
    considered: Sequence[tuple[str, str, int]]  # other sellers: (id, region, lease price)
    excluded: Mapping[str, int]
    seen: int
