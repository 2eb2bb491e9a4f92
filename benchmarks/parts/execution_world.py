"""What the benchmarks of execution share: an engine, an image, executors as a node opens them."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from lumaris_node.config import NodeConfig
from lumaris_node.executors.port import Executor, JobLimits, JobSpec, LogSink, Outcome
from lumaris_node.images.archive import make_image, pack_folder
from lumaris_node.tiers import make_executor
from lumaris_protocol import limits
from lumaris_protocol.ids import derive_id
from lumaris_protocol.messages.advert import Tier

ENGINE = Path(__file__).parents[2] / "tests" / "engine.sh"
# Own folders of a sandbox: a rival that has no staging needs them in the image.
FOLDERS = ("bin", "dev", "in", "out", "proc", "sys", "tmp")
# A variable by which the processes of these jobs are told from all others of the machine.
MARK = "LUMARIS_BENCH_MARK"
LIMITS = JobLimits(
    cpu_millis=1000,
    memory_bytes=256 * limits.MIB,
    disk_bytes=64 * limits.MIB,
    wall_s=60,
    fuel=limits.FUEL_MAX,
    log_bytes=limits.LOG_BYTES_MAX,
    output_bytes=8 * limits.MIB,
    output_files=10,
)
Row = Callable[..., None]


@dataclass
class World:
    """The machine as the benchmarks see it. `rounds` scales every repetition; 1 is quick."""

    folder: Path
    row: Row
    quick: bool
    engine: str = ""  # the engine's address; "" without one
    engine_folder: str = ""  # of an engine of our own
    image: str = ""  # busybox as a container image
    node: str = field(default_factory=lambda: f"B{os.urandom(8).hex()}")
    jobs: int = 0

    @property
    def root(self) -> Path:
        """The image's root folder, for rivals that need it unpacked."""
        return self.folder / "root"

    def rounds(self, full: int, quick: int) -> range:
        """As many repetitions as this run has time for."""
        return range(quick if self.quick else full)

    def note(self, text: str) -> None:
        """A row that says what is not measured, and why."""
        self.row(f"not measured: {text}", 0, "note")

    def lease(self) -> str:
        """A lease that no order had yet."""
        self.jobs += 1
        return derive_id("session", f"{self.node}-{self.jobs}".encode())

    def spec(
        self, image: str, command: tuple[str, ...], *, lease: str = "", **bounds: float
    ) -> JobSpec:
        """An order with the folders that all of this world's have."""
        self.jobs += 1
        job = derive_id("job", f"{self.node}-{self.jobs}".encode())
        inputs, outputs = self.folder / "work" / "in", self.folder / "work" / "out"
        bounded = replace(LIMITS, **bounds)  # type: ignore[arg-type]
        variables = {MARK: self.node}
        return JobSpec(job, image, command, variables, inputs, outputs, bounded, lease=lease)

    @asynccontextmanager
    async def executor(self, tier: Tier) -> AsyncIterator[Executor | None]:
        """A tier as a node opens it, with the image; None, and a note, where it does not work."""
        state = self.folder / "state"
        executor = make_executor(tier, state, NodeConfig(), self.node)
        try:
            if await executor.probe() is None:
                self.note(f"tier {tier}: its probe failed")
                yield None
                return
            if tier in ("process", "container"):
                await executor.add_image(self.image, self.folder / "image.tar")
            yield executor
        finally:
            if tier == "container" and self.engine:
                await executor.remove_image(self.image)
            await executor.aclose()

    def survivors(self) -> int:
        """Processes of this world's orders that live."""
        found, mark = 0, f"{MARK}={self.node}".encode()
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    found += mark in Path("/proc", name, "environ").read_bytes()
                except OSError:
                    continue
        return found

    def engine_processes(self) -> list[psutil.Process]:
        """The engine's own: its daemon, the containers' supervisor and the shims.

        Of an engine that is not ours, those of every engine of the machine.
        """
        found: list[psutil.Process] = []
        if not self.engine:
            return found
        for process in psutil.process_iter(["name", "cmdline"]):
            words = process.info["cmdline"] or []
            named = (process.info["name"] or "").startswith(("dockerd", "containerd"))
            if named and self.engine_folder in " ".join(words):
                found.append(process)
        return found


@contextmanager
def opened_world(folder: Path, row: Row, *, quick: bool, engine: bool) -> Iterator[World]:
    """A world in a fresh folder. An engine is started where it is wanted and none is named."""
    world = World(folder, row, quick)
    folder.chmod(0o711)  # bubblewrap as another user passes through
    _make_image(world)
    work = folder / "work"
    work.mkdir(mode=0o700)
    for name, mode in (("in", 0o755), ("out", 0o777)):
        (work / name).mkdir()
        (work / name).chmod(mode)
    (folder / "state").mkdir(mode=0o711)
    ours = folder / "engine"
    before = os.environ.get("DOCKER_HOST", "")
    world.engine = before
    try:
        if engine and not before and shutil.which("dockerd") and os.geteuid() == 0:
            up = subprocess.run([ENGINE, "up", ours], capture_output=True, text=True, check=False)
            if up.returncode == 0:
                world.engine, world.engine_folder = up.stdout.strip(), str(ours)
                os.environ["DOCKER_HOST"] = world.engine
        yield world
    finally:
        if ours.exists():
            subprocess.run([ENGINE, "down", ours], check=False)
        if not before:
            os.environ.pop("DOCKER_HOST", None)


def _make_image(world: World) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("It needs a static busybox for the guests' image.")
    for name in FOLDERS:
        (world.root / name).mkdir(parents=True)
    shutil.copy(busybox, world.root / "bin" / "busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for name in set(listed.stdout.split()) - {"busybox"}:
        (world.root / "bin" / name).symlink_to("busybox")
    # Else the engine's digest of it would be that of another run's image, which we then remove.
    (world.root / "bench").write_text(world.node)
    pack_folder(world.root, world.folder / "root.tar")
    archive = world.folder / "image.tar"
    world.image = make_image(world.folder / "root.tar", archive)


def tell(row: Row, name: str, times: list[float], most_ms: float | None = None) -> None:
    """Two rows of milliseconds. The bar is for the best: the rest has the machine's other work."""
    best = min(times)
    bar, holds = ("", None) if most_ms is None else (f"<= {most_ms:g}", best <= most_ms)
    row(f"{name} best", best, "ms", bar, holds)
    row(f"{name} p50", statistics.median(times), "ms")


async def discard(_stream: str, _data: bytes) -> None:
    """A log that nobody reads."""


async def run(executor: Executor, spec: JobSpec, log: LogSink = discard) -> Outcome:
    """One order from nothing to nothing."""
    handle = await executor.prepare(spec)
    try:
        await executor.start(handle, log)
        return await executor.wait(handle)
    finally:
        await executor.destroy(handle)


async def timed_run(executor: Executor, spec: JobSpec) -> float:
    """Milliseconds of an order, from its preparation to nothing left. It must succeed."""
    began = time.perf_counter()
    outcome = await run(executor, spec)
    elapsed = time.perf_counter() - began
    if outcome.reason != "succeeded":
        raise RuntimeError(f"{executor.tier}: {outcome}")
    return 1e3 * elapsed


def timed_command(command: list[str]) -> float:
    """Milliseconds of a program of this machine. It must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - began)


async def in_turn(
    ways: dict[str, Callable[[], Awaitable[float]]], rounds: range
) -> dict[str, list[float]]:
    """Every way once in each round, after a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, len(rounds)):
        for name, way in ways.items():
            value = await way()
            if number >= 0:
                found[name].append(value)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The middle of the ratios within one round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
