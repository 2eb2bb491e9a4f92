"""One order in a sandbox: a command run by exec, its streams, its limits and its end."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
from dataclasses import dataclass, field
from typing import Any

import trio

from lumaris_node.executors.container.cgroup import Facts
from lumaris_node.executors.container.config import guest_user
from lumaris_node.executors.container.engine import Engine, GuestStream
from lumaris_node.executors.container.sandbox import Sandbox
from lumaris_node.executors.port import JobSpec, LogSink, Outcome, Stream, Usage
from lumaris_node.executors.supervise import (
    LogGate,
    RunClock,
    disk_reason,
    enforce_deadline,
    enforce_disk,
    enforce_log,
)
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

SAMPLE_S = 0.1
# The engine learns of an end some milliseconds after the kernel; asked more and more slowly.
_ASK_S_MIN, _ASK_S_MAX = 0.003, 0.25
_BEGIN_S_MAX = 30
# An engine that is slow to answer is no reason to end what runs well; one that is gone is.
_ENGINE_S_MAX = 5
# After an end the engine holds about a megabyte of output at most.
_DRAIN_S_MAX = 10
# Output above a first burst is read at this pace, because each megabyte written line by line costs
# the engine about 45 ms of a core (measured) that no limit of the guest covers.
_BURST_BYTES = 1 * limits.MIB
_PACE_BYTES_PER_S = 2 * limits.MIB
# How the engine tells of a command that is not there, or may not be run.
_NO_COMMAND = (126, 127)
_BY_SIGNAL = 128


@dataclass
class Command:
    """A command in a sandbox, started by exec. Without `pidfd` only the engine knows its end."""

    engine: Engine
    identity: str
    stream: GuestStream
    pid: int = 0
    pidfd: int = -1

    @classmethod
    async def begin(
        cls,
        engine: Engine,
        sandbox: Sandbox,
        command: tuple[str, ...],
        environment: dict[str, str],
        *,
        stdin: bool,
        tty: bool = False,
    ) -> Command:
        """Start it. Raises LumarisError `bad_command`, `platform_error`."""
        made = await engine.call(
            "exec_create",
            sandbox.container,
            list(command),
            stdin=stdin,
            tty=tty,
            environment=environment,
            user=guest_user(),
            workdir="/out",
        )
        stream = await engine.open_exec(made["Id"], tty=tty)
        begun = cls(engine, made["Id"], stream)
        try:
            with trio.fail_after(_BEGIN_S_MAX):
                await begun._wait_begun(sandbox)
        except BaseException as error:
            await begun.aclose()
            if isinstance(error, trio.TooSlowError):
                raise LumarisError("platform_error", "The engine did not start it.") from error
            raise
        return begun

    async def _wait_begun(self, sandbox: Sandbox) -> None:
        pause_s = _ASK_S_MIN
        while True:
            state = await self.state()
            if state["Pid"]:
                self._watch(int(state["Pid"]), sandbox)
                return
            if state["ExitCode"] is not None:
                raise await self._not_begun(int(state["ExitCode"]))
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _ASK_S_MAX)

    def _watch(self, pid: int, sandbox: Sandbox) -> None:
        if sandbox.group is None or not sandbox.native:
            return
        with contextlib.suppress(OSError):
            self.pidfd, self.pid = os.pidfd_open(pid), pid
            # The number may be another's by now; in the group it cannot be.
            if pid not in sandbox.group.processes():
                os.close(self.pidfd)
                self.pidfd = -1

    async def _not_begun(self, status: int) -> LumarisError:
        text = b""
        with trio.move_on_after(1):
            while (part := await self.stream.receive()) is not None and len(text) < limits.KIB:
                text += part[1]
        why = text.decode("utf-8", "replace").strip()[-300:]
        unfit = status in _NO_COMMAND or "exec format error" in why
        return LumarisError("bad_command" if unfit else "platform_error", why or f"Exit {status}.")

    async def state(self) -> dict[str, Any]:
        """The engine's facts: Running, Pid, ExitCode."""
        found: dict[str, Any] = await self.engine.call("exec_inspect", self.identity)
        return found

    async def ended(self) -> None:
        """Return at its end, or after a while; the engine then says which."""
        if self.pidfd >= 0:
            with trio.move_on_after(1):
                await trio.lowlevel.wait_readable(self.pidfd)
        else:
            await trio.sleep(_ASK_S_MAX / 5)

    async def exit_status(self) -> int:
        """Once it has ended. Raises LumarisError when the engine went away."""
        pause_s = 0.0
        while True:
            state = await self.state()
            if not state["Running"] and state["ExitCode"] is not None:
                return int(state["ExitCode"])
            if pause_s:
                await trio.sleep(pause_s)
            else:
                await self.ended()
            pause_s = self._pause_after(pause_s)

    def _pause_after(self, pause_s: float) -> float:
        if self.pidfd >= 0 and not _readable(self.pidfd):
            return 0  # it runs: wait for the kernel's word again
        return min(max(2 * pause_s, _ASK_S_MIN), _ASK_S_MAX)

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal; False where that is not possible."""
        if self.pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            return False
        return True

    async def aclose(self) -> None:
        """Hang up. The command goes on until it is killed."""
        await self.stream.aclose()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Pace:
    """A leaky bucket for all output of a sandbox: the engine is held back by what is not read."""

    def __init__(self) -> None:
        self._level, self._at = 0.0, 0.0

    async def take(self, size: int) -> None:
        """Count what was read, and wait until more may be."""
        now = trio.current_time()
        self._level = max(0.0, self._level - (now - self._at) * _PACE_BYTES_PER_S) + size
        self._at = now
        if self._level > _BURST_BYTES:
            await trio.sleep((self._level - _BURST_BYTES) / _PACE_BYTES_PER_S)


@dataclass
class Run:
    """The private part of a handle."""

    engine: Engine
    spec: JobSpec
    sandbox: Sandbox
    clock: RunClock = field(default_factory=RunClock)
    command: Command | None = None
    gate: LogGate | None = None
    before: Facts = field(default_factory=Facts)
    now: Facts = field(default_factory=Facts)
    peak_exact: bool = False
    peak_bytes: int = 0
    reason: str = ""
    kill_at: float = math.inf
    killing: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | None = None
    gone: bool = False
    destroyed: bool = False
    pace: Pace = field(default_factory=Pace)
    ending: bool = False  # its end was seen: nothing begins beside it any more
    attaching: int = 0

    async def start(self, log: LogSink) -> None:
        """Begin the command. Raises LumarisError `bad_command`, `platform_error`."""
        spec = self.spec
        self.gate = LogGate(log, spec.limits.log_bytes)
        if self.sandbox.group is not None:
            self.peak_exact = self.sandbox.group.reset_peak()
            self.before = self.now = self.sandbox.group.facts()
        self.command = await Command.begin(
            self.engine, self.sandbox, spec.command, spec.environment, stdin=spec.stdin
        )
        self.clock.run()

    async def wait(self) -> Outcome:
        """Until it has ended and its output was passed on."""
        if self.outcome is None:
            try:
                self.outcome = await self._supervised()
            except* LumarisError as errors:
                self.clock.stop()
                self.outcome = await self._lost(str(errors.exceptions[0]))
        return self.outcome

    async def _supervised(self) -> Outcome:
        bounds, status = self.spec.limits, None
        assert self.gate is not None
        assert self.command is not None, "wait before start"
        async with trio.open_nursery() as watchers:
            watchers.start_soon(enforce_deadline, self.clock, bounds.wall_s, self.end)
            watchers.start_soon(enforce_log, self.gate, self.end)
            watchers.start_soon(self._watch_disk)
            watchers.start_soon(self._watch_kernel)
            watchers.start_soon(self._watch_grace)
            pumped = trio.Event()
            watchers.start_soon(self._pump, pumped)
            status = await self._exit_status()
            self.ending = True
            self.clock.stop()
            self.sample()
            # What it left running would hold its streams open.
            await self.sandbox.kill_guests(self.engine)
            with trio.move_on_after(_DRAIN_S_MAX):
                await pumped.wait()
            watchers.cancel_scope.cancel()
        outcome = self._judge(status)
        if outcome.reason == "exit_nonzero":
            full = await trio.to_thread.run_sync(disk_reason, self.spec)
            outcome = Outcome(full, None, outcome.usage) if full else outcome
        return outcome

    async def _lost(self, why: str) -> Outcome:
        """The sandbox or the engine is gone: end what lives, and find out whose doing it was."""
        await self.sandbox.kill_all()
        reason = self.reason
        if not reason:
            with trio.move_on_after(_ENGINE_S_MAX), contextlib.suppress(LumarisError):
                facts = await self.engine.call("inspect_container", self.sandbox.container)
                oom = bool((facts.get("State") or {}).get("OOMKilled"))
                reason = "killed_memory" if oom else ""
        return Outcome(reason or "platform_error", None, self.usage(), "" if reason else why)

    async def _exit_status(self) -> int | None:
        """None when it was killed by us, for then its status says nothing."""
        assert self.command is not None
        if self.command.pidfd >= 0:
            while not _readable(self.command.pidfd):
                await self.command.ended()
                if not _readable(self.command.pidfd):
                    with trio.move_on_after(_ENGINE_S_MAX):
                        await self.command.state()  # raises when the engine is gone
            if self.reason:
                return None
        status = await self.command.exit_status()
        if status >= _BY_SIGNAL and not self.reason and not await self.engine.answers():
            raise LumarisError("platform_error", "The container engine is stopping.")
        return status

    def _judge(self, status: int | None) -> Outcome:
        usage = self.usage()
        if self.reason or status is None:
            return Outcome(self.reason or "platform_error", None, usage)
        if status == 0:
            return Outcome("succeeded", 0, usage)
        if self.now.oom_kills > self.before.oom_kills:
            return Outcome("killed_memory", None, usage)
        if self.now.pids_hits > self.before.pids_hits:
            return Outcome("killed_pids", None, usage)
        return Outcome("exit_nonzero", status, usage)

    async def attach(
        self, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> ContainerAttachment:
        """Begin another command beside it. Raises LumarisError `not_attached`, `bad_command`."""
        self._check_attachable()
        self.attaching += 1
        try:
            begun = await Command.begin(
                self.engine, self.sandbox, command, self.spec.environment, stdin=True, tty=tty
            )
        except BaseException as error:
            if not isinstance(error, LumarisError) or error.code != "bad_command":
                self.sandbox.dirty = True  # the engine may begin it yet
            raise
        finally:
            self.attaching -= 1
        attachment = ContainerAttachment(begun, self.sandbox, self.pace, tty=tty)
        try:
            self._check_attachable()  # it may have ended meanwhile
            await attachment.resize(rows, columns)
        except BaseException:
            await attachment.aclose()
            raise
        return attachment

    def _check_attachable(self) -> None:
        over = self.ending or self.gone or self.outcome is not None or self.reason
        if self.command is None or over or self.sandbox.paused:
            raise LumarisError("not_attached", "The order does not run.")

    async def end(self, reason: str) -> None:
        """Kill it; the first reason given is the cause."""
        self.reason = self.reason or reason
        if self.outcome is None and self.command is not None:
            try:
                await self.sandbox.kill_guests(self.engine)
            except LumarisError:  # no engine: nothing inside may live on
                await self.sandbox.kill_all()

    async def cancel(self, reason: str, grace_s: float) -> None:
        """Kill it now, or ask it to end and kill it later."""
        asked = grace_s > 0 and self.command is not None and not self.sandbox.paused
        if asked and self.command is not None and self.command.signal(signal.SIGTERM):
            self.reason = self.reason or reason
            self.kill_at = min(self.kill_at, trio.current_time() + grace_s)
            self.killing.set()
        else:
            await self.end(reason)

    def sample(self) -> None:
        """Read the kernel's facts of the sandbox."""
        if self.sandbox.group is not None and not self.gone:
            found = self.sandbox.group.facts()
            if found.cpu_ms >= self.now.cpu_ms > 0 or not self.now.cpu_ms:
                self.now = found
            peak = found.memory_peak_bytes if self.peak_exact else found.memory_bytes
            self.peak_bytes = max(self.peak_bytes, peak)

    def usage(self) -> Usage:
        """What it consumed so far."""
        cpu_ms = max(0, self.now.cpu_ms - self.before.cpu_ms)
        return Usage(int(self.clock.elapsed_s * 1000), cpu_ms, self.peak_bytes)

    async def aclose(self) -> None:
        """Free what is held for the command; its processes are the sandbox's to end."""
        self.clock.stop()
        self.gone = True
        if self.command is not None:
            await self.command.aclose()

    async def _watch_kernel(self) -> None:
        while True:
            self.sample()
            if self.now.pids_hits > self.before.pids_hits:
                await self.end("killed_pids")
            await trio.sleep(SAMPLE_S)

    async def _watch_disk(self) -> None:
        spec, bounds = self.spec, self.spec.limits
        files_max = bounds.scratch_files
        await enforce_disk(
            spec.outputs, bounds.disk_bytes, self.end, files_max=files_max, use=spec.disk_use
        )

    async def _watch_grace(self) -> None:
        await self.killing.wait()
        await trio.sleep_until(self.kill_at)
        await self.end(self.reason)

    async def _pump(self, pumped: trio.Event) -> None:
        assert self.command is not None
        assert self.gate is not None
        while (part := await self.command.stream.receive()) is not None:
            await self.gate.put(*part)
            if not self.gate.over.is_set():
                await self.pace.take(len(part[1]))
        pumped.set()


class ContainerAttachment:
    """A further command in the sandbox of a running job; closing it kills the command."""

    def __init__(self, command: Command, sandbox: Sandbox, pace: Pace, *, tty: bool) -> None:
        self._command, self._sandbox, self._tty = command, sandbox, tty
        self._pace = pace
        self._closed = False

    async def send(self, data: bytes) -> None:
        """Bytes for its standard input. Raises LumarisError `not_attached`."""
        await self._command.stream.send(data)

    async def send_eof(self) -> None:
        """End its standard input."""
        await self._command.stream.send_eof()

    async def receive(self) -> tuple[Stream, bytes] | None:
        """Its next output; None after the last."""
        part = await self._command.stream.receive()
        if part is not None:
            await self._pace.take(len(part[1]))
        return part

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal another size."""
        if self._tty and not self._closed:
            with contextlib.suppress(LumarisError):  # it has just ended
                await self._command.engine.call(
                    "exec_resize", self._command.identity, height=rows, width=columns
                )

    async def exit_status(self) -> int:
        """Its exit status, once `receive` has returned None."""
        return await self._command.exit_status()

    async def aclose(self) -> None:
        """Kill it and what it started in its session, and free everything."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            if self._command.pidfd >= 0 and self._sandbox.group is not None:
                session = _session_of(self._command.pid)
                if not self._command.signal(signal.SIGKILL):
                    session = -1
                for pid in self._sandbox.group.processes():
                    if session > 0 and _session_of(pid) == session:
                        _kill_in(pid, session)
            await self._command.aclose()


def _readable(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _kill_in(pid: int, session: int) -> None:
    """Kill a process if it is still of that session: its number may be another's by now."""
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if os.getsid(pid) == session:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
