"""The wasm tier: every job is a process of its own, forked from a warm zygote and killable at once.

A guest has its arguments, the environment it was given, /in to read, /out to write, and two pipes.
Instructions are counted, the clock and randomness follow from the job (see `wasm_engine`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lumaris_node.executors.modules import ModuleStore
from lumaris_node.executors.port import Handle, JobLimits, JobSpec, LogSink, Outcome, Usage
from lumaris_node.executors.supervise import (
    End,
    LogGate,
    RunClock,
    enforce_deadline,
    enforce_disk,
    enforce_log,
)
from lumaris_node.executors.zygote import ZygoteClient
from lumaris_protocol import limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from lumaris_protocol.messages.advert import Runtime

# Users of the guest's and the compiler's process when the node runs as root. They own no file.
GUEST_UID = 10002
COMPILER_UID = 10003
STATUS_BYTES_MAX = 8192
REAP_S_MAX = 10
PROBE_S_MAX = 30
# A guest that ended badly this near to its memory limit is taken to have been refused more: the
# runtime does not tell which of its requests were refused.
MEMORY_FULL = 7 / 8
PROBE_TEXT = """(module
 (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
 (memory (export "memory") 1) (data (i32.const 8) "ok")
 (func (export "_start")
  (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 2))
  (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""


@dataclass
class WasmRun:
    """The private part of a handle: pipes, clock, and how the run ended."""

    code: Path
    clock: RunClock = field(default_factory=RunClock)
    stdout: int = -1
    stderr: int = -1
    status: int = -1
    gate: LogGate | None = None
    started: bool = False
    paused: bool = False
    reason: str = ""
    outcome: Outcome | None = None


class WasmExecutor:
    """The executor of tier `wasm`. Linux only; elsewhere its probe answers None."""

    tier = "wasm"

    def __init__(self, modules: ModuleStore) -> None:
        self.modules = modules
        self._zygote = ZygoteClient(GUEST_UID if _may_change_user() else 0)
        self._engine = ""
        self._runs: dict[str, Handle] = {}
        self._probed: Runtime | None = None

    @classmethod
    def open(cls, directory: Path) -> WasmExecutor:
        """An executor whose modules are kept in `directory`."""
        return cls(ModuleStore(directory, uid=COMPILER_UID if _may_change_user() else 0))

    @property
    def zygote_pid(self) -> int | None:
        """The process that jobs are forked from, once there is one."""
        return self._zygote.pid

    async def probe(self) -> Runtime | None:
        """The runtime, after a guest really ran and printed; None where it does not work."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            import wasmtime  # the node's extra; its import costs 50 ms

            from lumaris_node.executors.wasm_engine import version
        except ImportError:
            return None
        try:
            with trio.fail_after(PROBE_S_MAX):
                text = await self._run_probe(bytes(wasmtime.wat2wasm(PROBE_TEXT)))
        except (LumarisError, OSError, trio.TooSlowError):
            return None
        if text != b"ok":
            return None
        return Runtime(tier="wasm", version=f"wasmtime-{version()}", assurance="wasm")

    async def has_image(self, image: str) -> bool:
        """Whether the module is here or comes with an installed catalog package."""
        if self.modules.holds(image):
            return True  # one stat: cheaper than the thread it would move to
        return await trio.to_thread.run_sync(self.modules.has, image)

    async def add_image(self, image: str, source: Path) -> None:
        """Take in a module from a file the buyer sent. Raises LumarisError `bad_image`."""
        await trio.to_thread.run_sync(self.modules.add, source, image)

    async def images(self) -> tuple[str, ...]:
        """Modules held, those of the catalog first."""
        return await trio.to_thread.run_sync(self.modules.digests)

    async def compile(self, image: str) -> None:
        """Have a module's native code ready. Raises LumarisError as `prepare` does."""
        await self.modules.compiled(image, self._engine_key())

    async def prepare(self, spec: JobSpec) -> Handle:
        """Compile if needed and have the zygote ready. Raises `bad_image`, `bad_command`."""
        if spec.job in self._runs:
            raise LumarisError("platform_error", f"{spec.job} is prepared already.")
        for text in (*spec.command, *spec.environment, *spec.environment.values()):
            if "\0" in text:
                raise LumarisError("bad_command", "Arguments cannot hold a zero byte.")
        code = await self.modules.compiled(spec.image, self._engine_key())
        await self._zygote.warm()
        handle = Handle(spec, {"run": WasmRun(code)})
        self._runs[spec.job] = handle
        return handle

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Fork the job's process and start its clock."""
        run, spec = _run(handle), handle.spec
        assert not run.started, "started twice"

        async def end(reason: str) -> None:
            await self._end(handle, reason)

        run.gate = LogGate(log, spec.limits.log_bytes)
        with contextlib.ExitStack() as given:
            order = _closing(given, os.memfd_create("order", os.MFD_CLOEXEC))
            _fill(order, json.dumps(_order(spec)).encode())
            writers = []
            for name in ("stdout", "stderr", "status"):
                reader, writer = os.pipe2(os.O_CLOEXEC)
                setattr(run, name, reader)
                writers.append(_closing(given, writer))
            try:
                code = _closing(given, os.open(run.code, os.O_RDONLY | os.O_CLOEXEC))
                folder = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                inputs = _closing(given, os.open(spec.inputs, folder))
                outputs = _closing(given, os.open(spec.outputs, folder))
            except OSError as error:
                raise LumarisError(
                    "platform_error", f"{error.strerror}: a folder of the job"
                ) from error
            descriptors = (order, *writers, code, inputs, outputs)
            await self._zygote.start_job(spec.job, run.code.name, descriptors)
            run.started = True
            run.clock.run()

    async def wait(self, handle: Handle) -> Outcome:
        """Until the process is reaped and its output passed on."""
        run, spec = _run(handle), handle.spec
        if run.outcome is not None:
            return run.outcome
        assert run.started, "wait before start"
        assert run.gate is not None
        gate, end = run.gate, self._ender(handle)
        facts: dict[str, object] = {}
        async with trio.open_nursery() as watchers:
            watchers.start_soon(enforce_deadline, run.clock, spec.limits.wall_s, end)
            watchers.start_soon(enforce_log, gate, end)
            watchers.start_soon(enforce_disk, spec.outputs, spec.limits.disk_bytes, end)
            async with trio.open_nursery() as readers:
                readers.start_soon(gate.pump, "stdout", _pipe(run.stdout))
                readers.start_soon(gate.pump, "stderr", _pipe(run.stderr))
                facts = await _read_status(_pipe(run.status))
                run.clock.stop()
            watchers.cancel_scope.cancel()
        run.outcome = self._judge(handle, facts)
        return run.outcome

    async def pause(self, handle: Handle) -> None:
        """Stop the process; its wall clock stops with it."""
        run = _run(handle)
        if run.started and run.outcome is None and not run.paused:
            run.paused = True
            await self._zygote.signal_job(handle.spec.job, "stop")
            run.clock.stop()

    async def resume(self, handle: Handle) -> None:
        """Continue a stopped process."""
        run = _run(handle)
        if run.started and run.outcome is None and run.paused:
            run.paused = False
            run.clock.run()
            await self._zygote.signal_job(handle.spec.job, "cont")

    async def cancel(self, handle: Handle, reason: str) -> None:
        """Kill the process; `wait` then returns an Outcome with this reason."""
        await self._end(handle, reason)

    async def destroy(self, handle: Handle) -> None:
        """Kill what still runs and close the pipes. Idempotent."""
        run = _run(handle)
        if self._runs.pop(handle.spec.job, None) is None:
            return
        with trio.CancelScope(shield=True):
            if run.started and run.outcome is None:
                await self._end(handle, run.reason or "cancelled")
                with trio.move_on_after(REAP_S_MAX):
                    await _read_status(_pipe(run.status))
            run.clock.stop()
            for fd in (run.stdout, run.stderr, run.status):
                if fd >= 0:
                    os.close(fd)
            run.stdout = run.stderr = run.status = -1

    async def reap_orphans(self) -> int:
        """Always 0: a killed node's zygote sees its socket end, kills every child and exits."""
        return 0

    async def aclose(self) -> None:
        """End every job and the zygote."""
        with trio.CancelScope(shield=True):
            for handle in list(self._runs.values()):
                await self.destroy(handle)
            await self._zygote.aclose()

    def _ender(self, handle: Handle) -> End:
        async def end(reason: str) -> None:
            await self._end(handle, reason)

        return end

    async def _end(self, handle: Handle, reason: str) -> None:
        run = _run(handle)
        run.reason = run.reason or reason  # the first reason is the cause
        if run.started and run.outcome is None:
            with contextlib.suppress(LumarisError):  # no zygote, so no child either
                await self._zygote.signal_job(handle.spec.job, "kill")

    def _engine_key(self) -> str:
        if not self._engine:
            from lumaris_node.executors.wasm_engine import engine_key

            self._engine = engine_key()
        return self._engine

    def _judge(self, handle: Handle, facts: dict[str, object]) -> Outcome:
        run, bounds = _run(handle), handle.spec.limits
        usage = Usage(
            wall_ms=int(run.clock.elapsed_s * 1000),
            cpu_ms=_number(facts, "cpu_ms"),
            memory_peak_bytes=_number(facts, "memory_bytes") or _number(facts, "rss_bytes"),
            fuel=_number(facts, "fuel"),
        )
        detail = str(facts.get("detail", ""))
        trap = facts.get("trap")
        full = usage.memory_peak_bytes >= bounds.memory_bytes * MEMORY_FULL
        if run.reason:
            return Outcome(run.reason, None, usage, detail)
        if trap == "OUT_OF_FUEL":
            return Outcome("killed_fuel", None, usage, detail)
        if trap == "MEMORY_LIMIT" or (trap is not None and full and "memory_bytes" in facts):
            return Outcome("killed_memory", None, usage, detail)
        if trap is not None:
            return Outcome("killed_trap", None, usage, f"{trap}: {detail}")
        if facts.get("exit") == 0:
            return Outcome("succeeded", 0, usage)
        if "exit" in facts and full and "memory_bytes" in facts:
            return Outcome("killed_memory", None, usage)
        if "exit" in facts:
            return Outcome("exit_nonzero", _number(facts, "exit"), usage)
        if "failed" in facts and "deserial" in str(facts["failed"]):
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
        "seed": spec.job,
        "fuel": fuel_of(spec.limits),
        "memory_bytes": min(spec.limits.memory_bytes, 4 * limits.GIB),
        "file_bytes": min(spec.limits.disk_bytes, limits.FILE_BYTES_MAX),
        "cpu_s": int(spec.limits.wall_s * 1.25) + 5,
    }


def _fill(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def _closing(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


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


async def _read_status(source: trio.lowlevel.FdStream) -> dict[str, object]:
    """What the zygote says of an ended child; nothing when the zygote died with it."""
    data = b""
    async with source:
        while len(data) < STATUS_BYTES_MAX:
            part = await source.receive_some(STATUS_BYTES_MAX)
            if not part:
                break
            data += part
    facts: dict[str, object] = json.loads(data) if data else {"failed": "it went away"}
    return facts


def _number(facts: dict[str, object], key: str) -> int:
    value = facts.get(key, 0)
    return value if isinstance(value, int) else 0


def _may_change_user() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
