"""Attacks a tier through its own executor port, exactly as a buyer's order would run there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from lumaris_node.executors.port import Executor, JobLimits, JobSpec, Outcome
from lumaris_node.selftest import image as images
from lumaris_node.selftest import wasm_attack
from lumaris_node.selftest.rows import SUITE_VERSION, Row, has_own_kernel, judge, unshown
from lumaris_overlay.tasks import first_of
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest, make_id
from lumaris_protocol.limits import MIB
from lumaris_protocol.messages.advert import Runtime

RUN_S_MAX = 180.0
# What the deadline ended before it showed anything is repeated alone, with this long.
_ALONE_WALL_S = 30.0
_GONE_S_MAX = 2.0
_POLL_S = 0.02
# Attacks at once: a sandbox mostly waits for its own end, and these machines may have two cores.
_AT_ONCE = 3
_LOG_BYTES_MAX = 256 * 1024
_LIMITS = JobLimits(
    cpu_millis=1000,
    memory_bytes=192 * MIB,
    disk_bytes=64 * MIB,
    wall_s=10,
    fuel=0,
    log_bytes=_LOG_BYTES_MAX,
    output_bytes=MIB,
    output_files=16,
    pids=128,
    scratch_files=4096,
)
_CPU_MILLIS = 500
# The share may be overdrawn within one period, and starting an interpreter is part of the run.
_CPU_SLACK, _CPU_SLACK_MS = 1.25, 200


@dataclass(frozen=True)
class Report:
    """What a tier held off. `version` is the tier's own, `at` the node's clock in seconds."""

    tier: str
    version: str
    assurance: str
    suite: int
    at: int
    seconds: float
    rows: tuple[Row, ...]

    @property
    def held(self) -> bool:
        """Whether the tier may be offered."""
        return bool(self.rows) and all(row.held for row in self.rows if row.counts)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that forbid it."""
        return tuple(row for row in self.rows if row.failed)

    @property
    def unshown(self) -> tuple[Row, ...]:
        """The rows that this machine was too slow to show; they forbid it until they are."""
        return tuple(row for row in self.rows if row.counts and not row.shown)


async def run(
    executor: Executor, runtime: Runtime, folder: Path, *, clock: Callable[[], float] = time.time
) -> Report:
    """Attack a tier that answered its probe with `runtime`; `folder` is for files meanwhile.

    Raises LumarisError when the attacks could not be run; that is no report.
    """
    began = trio.current_time()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    attacks = _attack_wasm if runtime.tier == "wasm" else _attack_native
    try:
        with trio.fail_after(RUN_S_MAX):
            rows = await attacks(executor, runtime.assurance, folder)
    except trio.TooSlowError:
        raise LumarisError("timeout", "The self-test did not end in time.") from None
    return Report(
        tier=runtime.tier,
        version=runtime.version,
        assurance=runtime.assurance,
        suite=SUITE_VERSION,
        at=int(clock()),
        seconds=round(trio.current_time() - began, 2),
        rows=tuple(rows),
    )


@dataclass(frozen=True)
class _Bomb:
    """A job that must end in one of the ways named; `row` is judged by that."""

    mode: str
    row: str
    limits: JobLimits
    reasons: frozenset[str]


_BOMBS = (
    _Bomb("fork", "fork_bomb", replace(_LIMITS, pids=48), frozenset({"killed_pids"})),
    _Bomb(
        "memory",
        "memory_bomb",
        replace(_LIMITS, memory_bytes=96 * MIB),
        frozenset({"killed_memory"}),
    ),
    _Bomb("disk", "disk_bomb", replace(_LIMITS, disk_bytes=16 * MIB), frozenset({"killed_disk"})),
    _Bomb("files", "file_bomb", replace(_LIMITS, scratch_files=256), frozenset({"killed_inodes"})),
)
_FILLED = ("fill_tmp", "fill_shm", "fill_root", "files_in_tmp")


@dataclass
class _Run:
    """How one attack ended and what it printed."""

    outcome: Outcome
    output: bytes
    kernel_users: frozenset[int]

    def lines(self) -> Iterator[tuple[str, bool, str]]:
        """The program's report, as far as it is one."""
        for line in self.output.splitlines():
            try:
                found = json.loads(line)
                yield str(found["row"]), bool(found["open"]), str(found["detail"])
            except (ValueError, TypeError, KeyError):
                continue


class _SlowError(Exception):
    """The deadline came before the attack had succeeded or was held off: nothing is shown."""


@dataclass(frozen=True)
class _Attack:
    """A run of the attack program, and the rows that stay open when it shows nothing.

    `work` gets the wall time that it may take.
    """

    rows: tuple[str, ...]
    work: Callable[[float], Awaitable[None]]


class _Native:
    """The attacks on a tier that runs native programs."""

    def __init__(
        self, executor: Executor, assurance: str, folder: Path, guest: images.GuestImage
    ) -> None:
        self._executor, self._assurance, self._folder = executor, assurance, folder
        self._nonce, self._image = guest.nonce, guest.digest
        self.rows: list[Row] = []

    async def probes(self, wall_s: float) -> None:
        """Everything that needs no bomb, in one run."""
        with _bait() as facts:
            run = await self._run("probe", _LIMITS, wall_s, json.dumps(facts))
        lines = list(run.lines())
        for row, opened, detail in lines:
            self._judge(row, held=not opened, detail=detail)
        whole = run.outcome.reason == "succeeded" and len(lines) > len(_FILLED)
        self._judge("probes_ran", held=whole, detail=_ending(run))
        users = sorted(run.kernel_users)
        # On another kernel the program is no process of this machine, so none was seen.
        seen = bool(users) or has_own_kernel(self._assurance)
        self._judge("kernel_user_is_root", held=seen and 0 not in users, detail=f"users {users}")

    async def bomb(self, bomb: _Bomb, wall_s: float) -> None:
        """One bomb; what counts is the reason that the tier gives."""
        run = await self._run(bomb.mode, bomb.limits, wall_s)
        reasons = bomb.reasons
        if has_own_kernel(self._assurance):
            # Its own kernel's memory holds processes and files, and reaches its limit first.
            reasons = reasons | {"killed_memory", "succeeded"}
        opened = any(opened for row, opened, _ in run.lines() if row == bomb.row)
        held = run.outcome.reason in reasons and not opened
        self._judge(bomb.row, held=held, detail=_ending(run))

    async def fill(self, wall_s: float) -> None:
        """Bytes and files into every place that takes some."""
        run = await self._run("fill", _LIMITS, wall_s)
        killed = run.outcome.reason in ("killed_memory", "killed_disk", "killed_inodes")
        said = {row: (opened, detail) for row, opened, detail in run.lines()}
        for row in _FILLED:
            opened, detail = said.get(row, (not killed, _ending(run)))
            self._judge(row, held=not opened, detail=detail)

    async def cpu(self, wall_s: float) -> None:
        """Four busy processes get the share of one job, by the tier's own count."""
        run = await self._run("cpu", replace(_LIMITS, cpu_millis=_CPU_MILLIS), wall_s)
        usage = run.outcome.usage
        allowed = usage.wall_ms * _CPU_MILLIS / 1000 * _CPU_SLACK + _CPU_SLACK_MS
        held = run.outcome.reason == "succeeded" and 0 < usage.cpu_ms <= allowed
        self._judge("cpu_hog", held=held, detail=f"{usage.cpu_ms} of {usage.wall_ms} ms")

    async def survivors(self, wall_s: float) -> None:
        """A process that left its session and ignores signals ends with its job."""
        run = await self._run("survivors", _LIMITS, wall_s)
        self._judge(
            "survivors",
            held=run.outcome.reason == "succeeded" and not await _left(self._nonce, "survivors"),
            detail=_ending(run),
        )

    def _judge(self, row: str, *, held: bool, detail: str) -> None:
        self.rows.append(judge(row, held=held, assurance=self._assurance, detail=detail))

    async def _run(self, mode: str, limits: JobLimits, wall_s: float, *more: str) -> _Run:
        command = (*images.COMMAND, self._nonce, mode, *more)
        limits = replace(limits, wall_s=wall_s)
        async with _job(self._folder, self._image, command, limits) as plain:
            spec = replace(plain, environment=dict(images.ENVIRONMENT))
            run = await _run_job(self._executor, spec, (self._nonce, mode))
        if run.outcome.reason == "killed_deadline" and not self._opened(run):
            raise _SlowError
        return run

    def _opened(self, run: _Run) -> bool:
        return any(
            opened and judge(row, held=False, assurance=self._assurance).failed
            for row, opened, _ in run.lines()
        )


async def _attack_native(executor: Executor, assurance: str, folder: Path) -> list[Row]:
    guest = await trio.to_thread.run_sync(images.build, folder)
    try:
        await executor.add_image(guest.digest, guest.archive)
    finally:
        guest.archive.unlink(missing_ok=True)
    native = _Native(executor, assurance, folder, guest)
    bombs = [_Attack((bomb.row,), partial(native.bomb, bomb)) for bomb in _BOMBS]
    probes = _Attack(("probes_ran", "kernel_user_is_root"), native.probes)
    others = [
        _Attack(_FILLED, native.fill),
        _Attack(("cpu_hog",), native.cpu),
        _Attack(("survivors",), native.survivors),
    ]
    try:
        slow = await _together([probes])  # they look for what other attacks would leave
        slow += await _together([*bombs, *others])
        native.rows += await _alone(slow, assurance)
        left = await _left(guest.nonce, "")
        native.rows.append(judge("nothing_left", held=not left, assurance=assurance, detail=left))
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(_GONE_S_MAX):
            await executor.remove_image(guest.digest)
    return native.rows


async def _attack_wasm(executor: Executor, assurance: str, folder: Path) -> list[Row]:
    import wasmtime

    code = bytes(wasmtime.wat2wasm(wasm_attack.GUEST_TEXT))
    image, source = digest(code), folder / "attack.wasm"
    source.write_bytes(code)
    rows: list[Row] = []

    async def attack(item: wasm_attack.WasmAttack, wall_s: float) -> None:
        bounds = {"wall_s": wall_s} | item.bounds
        limits = replace(_LIMITS, **bounds)  # type: ignore[arg-type] # whole numbers are floats
        async with _job(folder, image, ("attack", item.letter), limits) as spec:
            run = await _run_job(executor, spec, None)
        if run.outcome.reason == "killed_deadline" and run.outcome.reason not in item.reasons:
            raise _SlowError
        held = run.outcome.reason in item.reasons
        rows.append(judge(item.row, held=held, assurance=assurance, detail=_ending(run)))

    try:
        await executor.add_image(image, source)
        slow = await _together(
            [_Attack((item.row,), partial(attack, item)) for item in wasm_attack.ATTACKS]
        )
        rows += await _alone(slow, assurance)
    finally:
        source.unlink(missing_ok=True)
        with trio.CancelScope(shield=True), trio.move_on_after(_GONE_S_MAX):
            await executor.remove_image(image)
    return rows


async def _together(attacks: Sequence[_Attack]) -> list[_Attack]:
    """Run them all, few at once; those that showed nothing in their time.

    Raises the first LumarisError alone, as one attack would.
    """
    limiter, slow = trio.CapacityLimiter(_AT_ONCE), list[_Attack]()

    async def one(attack: _Attack) -> None:
        async with limiter:
            try:
                await attack.work(_LIMITS.wall_s)
            except _SlowError:
                slow.append(attack)

    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            for attack in attacks:
                nursery.start_soon(one, attack)
    except* LumarisError as group:
        failure = first_of(group)
    if failure is not None:
        raise failure
    return slow


async def _alone(slow: Sequence[_Attack], assurance: str) -> list[Row]:
    """Repeat attacks one by one with longer walls; rows that are not shown even so."""
    rows = []
    for attack in slow:
        try:
            await attack.work(max(_ALONE_WALL_S, _LIMITS.wall_s))
        except _SlowError:
            detail = "not shown: this machine was too slow"
            rows += [unshown(row, assurance=assurance, detail=detail) for row in attack.rows]
    return rows


@asynccontextmanager
async def _job(
    folder: Path, image: str, command: tuple[str, ...], limits: JobLimits
) -> AsyncIterator[JobSpec]:
    """A job with folders of its own, which are gone after it."""
    job = make_id("job", os.urandom(15))
    root = folder / job
    inputs, outputs = root / "in", root / "out"
    for made, mode in ((root, 0o711), (inputs, 0o755), (outputs, 0o777)):
        made.mkdir()
        made.chmod(mode)
    try:
        yield JobSpec(job, image, command, {}, inputs, outputs, limits)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(root, ignore_errors=True))


async def _run_job(executor: Executor, spec: JobSpec, named: tuple[str, str] | None) -> _Run:
    output = bytearray()
    users: set[int] = set()

    async def log(stream: str, data: bytes) -> None:
        if stream == "stdout":
            output.extend(data[: _LOG_BYTES_MAX - len(output)])

    async def watch() -> None:
        while named is not None:
            users.update(_users(*named))
            await trio.sleep(_POLL_S)

    handle = await executor.prepare(spec)
    try:
        await executor.start(handle, log)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            outcome = await executor.wait(handle)
            nursery.cancel_scope.cancel()
    finally:
        await executor.destroy(handle)
    return _Run(outcome, bytes(output), frozenset(users))


@contextmanager
def _bait() -> Iterator[dict[str, object]]:
    """What the program looks for: two open doors of this host, and what its namespaces are."""
    name = f"lumaris-selftest-{os.urandom(8).hex()}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(1)
        unix.bind(f"\0{name}")
        unix.listen(1)
        names = ("pid", "net", "mnt", "ipc", "uts")
        yield {
            "port": tcp.getsockname()[1],
            "abstract": name,
            "hostname": os.uname().nodename,
            "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in names},
        }


def _processes(nonce: str, mode: str) -> Iterator[Path]:
    """Processes of this machine that are the attack program in a mode, or in any."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = words[0] == images.COMMAND[0].encode() and nonce.encode() in words
        if ours and (not mode or mode.encode() in words):
            yield folder


def _users(nonce: str, mode: str) -> Iterator[int]:
    """The kernel's users of these processes, whatever they are called inside."""
    for folder in _processes(nonce, mode):
        try:  # and not the folder's owner, who is root where a process may not be traced
            lines = (folder / "status").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("Uid:"):
                yield from map(int, line.split()[1:])


async def _left(nonce: str, mode: str) -> str:
    """Processes that outlive their job, "" when there are none soon."""
    with trio.move_on_after(_GONE_S_MAX):
        while any(_processes(nonce, mode)):  # noqa: ASYNC110 - other processes end
            await trio.sleep(_POLL_S)
    return " ".join(folder.name for folder in _processes(nonce, mode))


def _ending(run: _Run) -> str:
    outcome = run.outcome
    status = "" if outcome.exit_status is None else f" {outcome.exit_status}"
    return f"{outcome.reason}{status} {outcome.detail}".strip()
