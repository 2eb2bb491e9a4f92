"""One run of the process tier: what is held for it, what is heard of it, and how it ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from dataclasses import dataclass, field

import trio

from lumaris_node.executors.port import Handle, LogSink, Outcome, Usage
from lumaris_node.executors.process.signals import users_of
from lumaris_node.executors.supervise import LogGate, RunClock
from lumaris_node.sandbox.cgroups import Facts, Group
from lumaris_protocol.errors import LumarisError

STATUS_BYTES_MAX = 8192
NOTE_BYTES_MAX = 1024


@dataclass
class ProcessRun:
    """The private part of a handle: the sandbox's pipes, group and clock, and how it ended."""

    group: Group
    user: int = 0  # to the kernel; no other sandbox has it
    # Keeps the image from being evicted.
    image: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    clock: RunClock = field(default_factory=RunClock)
    stdout: int = -1
    stderr: int = -1
    status: trio.lowlevel.FdStream | None = None
    go: int = -1
    stdin: trio.lowlevel.FdStream | None = None
    child: int = 0
    said: bytes = b""
    note: bytes = b""  # the beginning of standard error
    gate: LogGate | None = None
    started: bool = False
    paused: bool = False
    reason: str = ""
    grace_until: float = float("inf")
    grace_set: trio.Event = field(default_factory=trio.Event)
    facts: Facts = field(default_factory=Facts)
    outcome: Outcome | None = None


def run_of(handle: Handle) -> ProcessRun:
    """The private part of a handle."""
    run = handle.private["run"]
    assert isinstance(run, ProcessRun)
    return run


def pipe(fd: int) -> trio.lowlevel.FdStream:
    """A second descriptor of the same pipe, so that a cancelled wait can be repeated."""
    return trio.lowlevel.FdStream(os.dup(fd))


def check(run: ProcessRun) -> None:
    """Refuse to go on with a sandbox that is not there, or that is root to the kernel."""
    if not run.child:
        note = failure(run) or os.read(run.stderr, NOTE_BYTES_MAX).decode(errors="replace")
        code = "bad_command" if os.strerror(errno.E2BIG) in note else "platform_error"
        raise LumarisError(code, f"No sandbox: {note.strip()[:300]}.")
    users = users_of(run.child)
    if users != {run.user}:
        raise LumarisError("platform_error", f"The sandbox has kernel users {sorted(users)}.")


def judge(run: ProcessRun, full: str) -> Outcome:
    """How it ended; `full` is the disk limit that it is over at its end, or empty."""
    usage, note = usage_of(run), run.note.decode(errors="replace").strip()
    if reason := run.reason or kernel_reason(run.facts):
        return Outcome(reason, None, usage)
    code = told(run, "exit-code")
    if full:
        return Outcome(full, None, usage)
    if isinstance(code, int):
        return Outcome("exit_nonzero" if code else "succeeded", code, usage)
    # bubblewrap is silent about a command that never ran, so this is its own word, not the guest's.
    if note.startswith("bwrap: execvp "):
        return Outcome("bad_command", None, usage, note[:300])
    return Outcome("platform_error", None, usage, failure(run) or note[:300] or "It went away.")


def kernel_reason(facts: Facts) -> str:
    """Why the kernel's counters end a run; empty when they do not."""
    if facts.oom_kills:
        return "killed_memory"
    return "killed_pids" if facts.pids_refused else ""


def usage_of(run: ProcessRun) -> Usage:
    """What the run used by the last facts."""
    return Usage(
        wall_ms=int(run.clock.elapsed_s * 1000),
        cpu_ms=run.facts.cpu_ms,
        memory_peak_bytes=run.facts.memory_peak_bytes,
    )


async def hear(run: ProcessRun) -> bool:
    """Take in what bubblewrap or the launcher says; False at the end."""
    assert run.status is not None
    part = await run.status.receive_some(STATUS_BYTES_MAX)
    run.said = (run.said + bytes(part))[:STATUS_BYTES_MAX]
    child = told(run, "child-pid")
    run.child = child if isinstance(child, int) else 0
    return bool(part)


def told(run: ProcessRun, key: str) -> object:
    """A value from the whole lines said so far."""
    for line in run.said.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if key in found:
                return found[key]
    return None


def failure(run: ProcessRun) -> str:
    """What the launcher says went wrong before the sandbox was there; mostly empty."""
    return str(told(run, "failed") or "")


def noting(run: ProcessRun, log: LogSink) -> LogSink:
    """The log, with the beginning of standard error kept."""

    async def put(stream: str, data: bytes) -> None:
        if stream == "stderr":
            run.note = (run.note + data)[:NOTE_BYTES_MAX]
        await log("stderr" if stream == "stderr" else "stdout", data)

    return put


async def close_stdin(run: ProcessRun) -> None:
    """End the guest's standard input; without one nothing happens."""
    stream, run.stdin = run.stdin, None
    if stream is not None:
        await stream.aclose()  # a writer that waits is told


def free(run: ProcessRun) -> bool:
    """Remove the group with all in it and release the image; False when it stays. Blocks."""
    gone = run.group.remove()
    run.image.close()
    return gone
