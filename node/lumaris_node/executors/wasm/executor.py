"""The wasm tier: a lease has a worker process of its own, which is killable at once.

A guest has its arguments, the environment it was given, /in to read, /out to write, and pipes.
Instructions are counted, the clock and randomness follow from the job (see `wasm_engine`). The
worker runs the lease's orders one after another, each in a fresh instance; one that was killed is
replaced for the next order. A guest has no signals: it cannot be asked to end, so a cancelled one
is killed at once, whatever the grace.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lumaris_node.executors.port import (
    Attachment,
    Handle,
    JobLimits,
    JobSpec,
    LogSink,
    Outcome,
    Progress,
    Stream,
    Usage,
)
from lumaris_node.executors.supervise import (
    End,
    LogGate,
    RunClock,
    enforce_deadline,
    enforce_disk,
    enforce_log,
)
from lumaris_node.executors.wasm.lease import Lease, Leases
from lumaris_node.executors.wasm.modules import ModuleStore
from lumaris_node.sandbox import users
from lumaris_protocol import limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from lumaris_protocol.messages.advert import Runtime

# Users of the guest's and the compiler's process when the node runs as root. They own no file.
GUEST_UID = users.WASM_GUEST
COMPILER_UID = users.COMPILER
PROBE_S_MAX = 30
COUNT_MAX = 2**53
BRIEF_S = 0.02
STREAMS_S_MAX = 5
PIPE_BYTES = 64 * 1024
PIPES_BYTES_MAX = 1024 * 1024  # the most that a pipe may hold on Linux
STDIN_S_MAX = 600  # a guest that reads nothing for so long gets no more input
PROBE_TEXT = """(module
 (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
 (memory (export "memory") 1) (data (i32.const 8) "ok")
 (func (export "_start")
  (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 2))
  (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""


@dataclass
class WasmRun:
    """The private part of a handle: worker, pipes, clock, and how the run ended."""

    code: Path
    lease: Lease
    clock: RunClock = field(default_factory=RunClock)
    stdin: trio.lowlevel.FdStream | None = None
    stdout: int = -1
    stderr: int = -1
    gate: LogGate | None = None
    cpu_before_ms: int = 0
    started: bool = False
    paused: bool = False
    reason: str = ""
    outcome: Outcome | None = None


class WasmExecutor:
    """The executor of tier `wasm`. Linux only; elsewhere its probe answers None."""

    tier = "wasm"
    why_not = ""

    def __init__(self, modules: ModuleStore, *, mark: str = "") -> None:
        """`mark` begins the names of this node's control groups; without it none are made."""
        self.modules = modules
        self._leases = Leases(GUEST_UID if _may_change_user() else 0, mark=mark)
        self._engine = ""
        self._runs: dict[str, Handle] = {}

    @classmethod
    def open(cls, directory: Path, *, mark: str = "") -> WasmExecutor:
        """An executor whose modules are kept in `directory`."""
        uid = COMPILER_UID if _may_change_user() else 0
        return cls(ModuleStore(directory, uid=uid), mark=mark)

    @property
    def zygote_pid(self) -> int | None:
        """The process that workers are forked from, once there is one."""
        return self._leases.zygote.pid

    def worker_pid(self, lease: str) -> int | None:
        """The process that a lease's orders run in, while one is warm for it."""
        return self._leases.pid(lease)

    async def probe(self) -> Runtime | None:
        """The runtime, after a guest really ran and printed; None where it does not work."""
        if not sys.platform.startswith("linux"):
            self.why_not = "It needs Linux."
            return None
        try:
            import wasmtime  # the node's extra; its import costs 50 ms

            from lumaris_node.executors.wasm.engine import version
        except ImportError as error:
            self.why_not = f"{error}."
            return None
        try:
            with trio.fail_after(PROBE_S_MAX):
                text = await self._run_probe(bytes(wasmtime.wat2wasm(PROBE_TEXT)))
        except (LumarisError, OSError, trio.TooSlowError) as error:
            self.why_not = str(error) or f"Its probe took over {PROBE_S_MAX} s."
            return None
        if text != b"ok":
            self.why_not = f"Its probe said {text[:200]!r}."
            return None
        self.why_not = ""
        return Runtime(
            tier="wasm",
            version=f"wasmtime-{version()}",
            assurance="wasm",
            features=("stdin", "warm"),
        )

    async def has_image(self, image: str) -> bool:
        """Whether the module is here or comes with an installed catalog package."""
        if self.modules.holds(image):
            return True  # one stat: cheaper than the thread it would move to
        return await trio.to_thread.run_sync(self.modules.has, image)

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        """Take in a module from a file the buyer sent. Raises LumarisError `bad_image`."""
        await trio.to_thread.run_sync(self.modules.add, source, image)

    async def images(self) -> tuple[str, ...]:
        """Modules held, those of the catalog first."""
        return await trio.to_thread.run_sync(self.modules.digests)

    async def remove_image(self, image: str) -> None:
        """Forget a module and its native code; a running job keeps what it has open."""
        await trio.to_thread.run_sync(self.modules.remove, image)

    async def compile(self, image: str, progress: Progress | None = None) -> None:
        """Have a module's native code ready. Raises LumarisError as `prepare` does."""
        await self.modules.compiled(image, self._engine_key(), progress)

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        """Compile if needed and have a worker. Raises `bad_image`, `bad_command`, `memory_short`,
        `image_timeout`, `tier_unavailable`."""
        if spec.job in self._runs:
            raise LumarisError("platform_error", f"{spec.job} is prepared already.")
        for text in (*spec.command, *spec.environment, *spec.environment.values()):
            if "\0" in text:
                raise LumarisError("bad_command", "Arguments cannot hold a zero byte.")
        code = await self.modules.compiled(spec.image, self._engine_key(), progress)
        lease = await self._leases.take(spec, code)
        handle = Handle(spec, {"run": WasmRun(code, lease)})
        self._runs[spec.job] = handle
        return handle

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Give the order to the worker and start its clock."""
        run, spec = _run(handle), handle.spec
        assert not run.started, "started twice"
        run.gate = LogGate(log, spec.limits.log_bytes)
        folders = ((spec.inputs, "/in", False), (spec.outputs, "/out", True))
        further = tuple((path, guest, False) for path, guest in spec.mounts)
        companions = tuple(
            (path, guest, False) for guest, path in self.modules.companions(spec.image)
        )
        run.cpu_before_ms = run.lease.cpu_ms()
        with contextlib.ExitStack() as given:
            fds = {}
            for name in ("stdout", "stderr"):
                reader, fds[name] = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(reader, False)
                setattr(run, name, reader)
                given.callback(os.close, fds[name])
            if spec.stdin:
                fds["stdin"], writer = os.pipe2(os.O_CLOEXEC)
                run.stdin = trio.lowlevel.FdStream(writer)
                given.callback(os.close, fds["stdin"])
                if _may_change_user():
                    os.fchown(fds["stdin"], GUEST_UID, GUEST_UID)  # the guest's user opens it
            await run.lease.order(
                {**_order(spec), "module": run.code.name},
                code=run.code,
                folders=(*folders, *companions, *further),
                **fds,
            )
        run.started = True
        run.clock.run()

    async def wait(self, handle: Handle) -> Outcome:
        """Until the worker said how the order ended, or is gone, and its output was passed on."""
        run, spec = _run(handle), handle.spec
        if run.outcome is not None:
            return run.outcome
        assert run.started, "wait before start"
        assert run.gate is not None
        facts = await self._wait_briefly(run, run.gate, spec.limits.wall_s)
        if facts is None:
            facts = await self._watch(handle, run.gate)
        run.outcome = self._judge(handle, facts)
        return run.outcome

    async def _wait_briefly(
        self, run: WasmRun, gate: LogGate, wall_s: float
    ) -> dict[str, object] | None:
        """The end of an order that takes milliseconds, without the tasks that watch a longer one.

        Within that time it fills no more than its pipes and passes no limit that is not the
        worker's own.
        """
        with trio.move_on_after(min(BRIEF_S, wall_s - run.clock.elapsed_s)) as scope:
            facts = await run.lease.result()
        if scope.cancelled_caught:
            return None
        run.clock.stop()
        pipes: tuple[tuple[Stream, int], ...] = (("stdout", run.stdout), ("stderr", run.stderr))
        for stream, fd in pipes:
            data = _drain(fd)
            if data:
                await gate.put(stream, data)
        if gate.over.is_set():
            run.reason = run.reason or "killed_log"
        return facts

    async def _watch(self, handle: Handle, gate: LogGate) -> dict[str, object]:
        """The end of an order, with every limit enforced and its output passed on meanwhile."""
        run, spec, end = _run(handle), handle.spec, self._ender(handle)
        async with trio.open_nursery() as watchers:
            watchers.start_soon(enforce_deadline, run.clock, spec.limits.wall_s, end)
            watchers.start_soon(enforce_log, gate, end)
            watchers.start_soon(self._watch_disk, spec, end)
            async with trio.open_nursery() as readers:
                readers.start_soon(gate.pump, "stdout", _pipe(run.stdout))
                readers.start_soon(gate.pump, "stderr", _pipe(run.stderr))
                facts = await run.lease.result()
                run.clock.stop()
                watchers.start_soon(self._close_streams, run)
            watchers.cancel_scope.cancel()
        return facts

    async def usage(self, handle: Handle) -> Usage:
        """Wall and processor time so far; memory and fuel are known at the end."""
        run = _run(handle)
        if run.outcome is not None:
            return run.outcome.usage
        cpu_ms = max(0, run.lease.cpu_ms() - run.cpu_before_ms) if run.started else 0
        return Usage(wall_ms=int(run.clock.elapsed_s * 1000), cpu_ms=cpu_ms)

    async def pause(self, handle: Handle) -> None:
        """Stop the process; its wall clock stops with it."""
        run = _run(handle)
        if run.started and run.outcome is None and not run.paused:
            run.paused = True
            await run.lease.signal("stop")
            run.clock.stop()

    async def resume(self, handle: Handle) -> None:
        """Continue a stopped process."""
        run = _run(handle)
        if run.started and run.outcome is None and run.paused:
            run.paused = False
            run.clock.run()
            await run.lease.signal("cont")

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        """Kill the worker at once; `wait` then returns an Outcome with this reason."""
        await self._end(handle, reason)

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        """Bytes for the guest's standard input, b"" to end it. Raises `not_attached`."""
        run = _run(handle)
        stream = run.stdin
        if stream is None or run.outcome is not None:
            raise LumarisError("not_attached")
        if not data:
            await stream.aclose()
            return
        try:
            with trio.fail_after(STDIN_S_MAX):
                await stream.send_all(data)
        except (OSError, trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
            raise LumarisError("not_attached") from None

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Attachment:
        """Always `not_supported`: a guest is one program."""
        raise LumarisError("not_supported", "A wasm guest has no second command.")

    async def network_pid(self, handle: Handle) -> int:
        """Always `not_supported`: a guest has no sockets."""
        raise LumarisError("not_supported", "A wasm guest has no network.")

    async def destroy(self, handle: Handle) -> None:
        """End the order if it runs and close its pipes. Idempotent."""
        run = _run(handle)
        if self._runs.pop(handle.spec.job, None) is None:
            return
        with trio.CancelScope(shield=True):
            if run.started and run.outcome is None:
                run.reason = run.reason or "cancelled"
                await self._leases.drop(run.lease)
            elif not handle.spec.lease:
                await self._leases.drop(run.lease)
            run.clock.stop()
            if run.stdin is not None:
                await run.stdin.aclose()
            for fd in (run.stdout, run.stderr):
                if fd >= 0:
                    os.close(fd)
            run.stdout = run.stderr = -1

    async def release(self, lease: str) -> None:
        """End the lease's worker. Idempotent."""
        with trio.CancelScope(shield=True):
            await self._leases.release(lease)

    async def reap_orphans(self) -> int:
        """Groups a killed node left. Processes never are: its zygote ends with them."""
        return await trio.to_thread.run_sync(self._leases.reap_groups)

    async def reap_left(self) -> int:
        """None: what a job held ends with it here."""
        return 0

    async def aclose(self) -> None:
        """End every job, every worker and the zygote."""
        with trio.CancelScope(shield=True):
            for handle in list(self._runs.values()):
                await self.destroy(handle)
            await self._leases.aclose()

    async def _close_streams(self, run: WasmRun) -> None:
        """A worker closes an order's streams before it tells its end, unless it is broken."""
        await trio.sleep(STREAMS_S_MAX)
        await run.lease.signal("kill")

    async def _watch_disk(self, spec: JobSpec, end: End) -> None:
        bounds = spec.limits
        await enforce_disk(
            spec.outputs,
            bounds.disk_bytes,
            end,
            files_max=bounds.scratch_files,
            use=spec.disk_use,
        )

    def _ender(self, handle: Handle) -> End:
        async def end(reason: str) -> None:
            await self._end(handle, reason)

        return end

    async def _end(self, handle: Handle, reason: str) -> None:
        run = _run(handle)
        run.reason = run.reason or reason  # the first reason is the cause
        if run.started and run.outcome is None:
            await run.lease.signal("kill")

    def _engine_key(self) -> str:
        if not self._engine:
            from lumaris_node.executors.wasm.engine import engine_key

            self._engine = engine_key()
        return self._engine

    def _judge(self, handle: Handle, facts: dict[str, object]) -> Outcome:
        run = _run(handle)
        gone = "signal" in facts  # the worker with all it used, of which this order's share counts
        usage = Usage(
            wall_ms=int(run.clock.elapsed_s * 1000),
            cpu_ms=max(0, _number(facts, "cpu_ms") - (run.cpu_before_ms if gone else 0)),
            memory_peak_bytes=_number(facts, "memory_bytes") or _number(facts, "rss_bytes"),
            fuel=_number(facts, "fuel"),
        )
        detail = str(facts.get("detail", ""))[:400]
        trap, status = facts.get("trap"), facts.get("exit")
        if run.reason:
            return Outcome(run.reason, None, usage, detail)
        if trap == "OUT_OF_FUEL":
            return Outcome("killed_fuel", None, usage, detail)
        if status == 0:
            return Outcome("succeeded", 0, usage)
        if (trap is not None or status is not None) and _number(facts, "refusals"):
            # It was refused memory and then failed, as a process that the kernel ends for it.
            return Outcome("killed_memory", None, usage, detail)
        if trap is not None:
            return Outcome("killed_trap", None, usage, f"{trap}: {detail}")
        if isinstance(status, int):
            return Outcome("exit_nonzero", status, usage)
        if facts.get("oom"):
            return Outcome("killed_memory", None, usage)
        if "deserial" in str(facts.get("failed", "")):
            self.modules.forget_compiled(handle.spec.image, self._engine_key())
        cause = facts.get("failed") or f"signal {facts.get('signal', 'unknown')}"
        return Outcome("platform_error", None, usage, f"The wasm worker failed: {cause}")

    async def _run_probe(self, module: bytes) -> bytes:
        folder = self.modules.directory / f"probe-{os.urandom(6).hex()}"
        folder.mkdir(mode=0o700)
        source = folder / "module"
        source.write_bytes(module)
        image, said = digest(module), bytearray()

        async def log(_stream: str, data: bytes) -> None:
            said.extend(data)

        try:
            await trio.to_thread.run_sync(self.modules.add, source, image)
            bounds = JobLimits(1000, 1 << 20, 1 << 20, 5.0, 1_000_000, 64, 0, 0)
            spec = JobSpec(folder.name, image, ("probe",), {}, folder, folder, bounds)
            handle = await self.prepare(spec)
            try:
                await self.start(handle, log)
                outcome = await self.wait(handle)
            finally:
                await self.destroy(handle)
            return bytes(said) if outcome.reason == "succeeded" else b""
        finally:
            source.unlink(missing_ok=True)
            folder.rmdir()


def _order(spec: JobSpec) -> dict[str, object]:
    """What the job's child is told, beside its descriptors."""
    environment = dict(spec.environment)
    if any(entry.digest == spec.image and "python" in entry.name for entry in CATALOG.values()):
        environment.setdefault("PYTHONHASHSEED", "0")  # hash order is part of a result
    return {
        "argv": list(spec.command),
        "env": sorted(environment.items()),
        "stdin": spec.stdin,
        "seed": spec.job,
        "fuel": fuel_of(spec.limits),
        "memory_bytes": min(spec.limits.memory_bytes, 4 * limits.GIB),
        "file_bytes": min(spec.limits.disk_bytes, limits.FILE_BYTES_MAX),
        "cpu_s": int(spec.limits.wall_s * 1.25) + 5,
    }


def fuel_of(bounds: JobLimits) -> int:
    """The instruction budget; 0 in the limits means none, and it is counted all the same."""
    return min(bounds.fuel or limits.FUEL_MAX, limits.FUEL_MAX)


def _run(handle: Handle) -> WasmRun:
    run = handle.private["run"]
    assert isinstance(run, WasmRun)
    return run


def _pipe(fd: int) -> trio.lowlevel.FdStream:
    """A second descriptor of the same pipe, so that a cancelled wait can be repeated."""
    return trio.lowlevel.FdStream(os.dup(fd))


def _drain(fd: int) -> bytes:
    """What an ended order left in a pipe; no more than the pipe holds, and without waiting."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, PIPE_BYTES):
            data += part
            if len(data) >= PIPES_BYTES_MAX:
                break
    return data


def _number(facts: dict[str, object], key: str) -> int:
    """A count that a worker told; a broken one may tell anything, but none that is no count."""
    value = facts.get(key, 0)
    return min(max(value, 0), COUNT_MAX) if isinstance(value, int) else 0


def _may_change_user() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
