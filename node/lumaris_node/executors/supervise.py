"""What every tier enforces the same way: the wall clock that pauses, the caps of log and disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from lumaris_node.executors.port import DiskUse, JobSpec, LogSink, Stream
from lumaris_node.workspace.tree import disk_use
from lumaris_protocol import limits

# A guest writes at most about 1 GB/s, so it overshoots its disk limit by 50 MB before it is seen.
DISK_POLL_S = 0.05
# Folders are scanned at most a tenth of the time, however many files they hold.
DISK_POLL_SHARE = 10
# And yet at least so often: a look that the machine's load made slow must not blind us for minutes.
DISK_POLL_S_MAX = 2.0
End = Callable[[str], Awaitable[None]]


class RunClock:
    """Wall time of a run, without its pauses."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before = 0.0
        self._changed = trio.Event()

    def run(self) -> None:
        """Start, or go on after a pause."""
        if self._since is None:
            self._since = trio.current_time()
            self._notify()

    def stop(self) -> None:
        """Pause, or end."""
        if self._since is not None:
            self._before += trio.current_time() - self._since
            self._since = None
            self._notify()

    @property
    def elapsed_s(self) -> float:
        """Seconds run so far."""
        return self._before + (trio.current_time() - self._since if self._since is not None else 0)

    async def reach(self, wall_s: float) -> None:
        """Return once `wall_s` seconds have been run."""
        while self.elapsed_s < wall_s:
            changed = self._changed
            left = wall_s - self.elapsed_s if self._since is not None else float("inf")
            with trio.move_on_after(left):
                await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class LogGate:
    """Passes guest output on until the cap of both streams; what is above is dropped."""

    def __init__(self, sink: LogSink, cap_bytes: int) -> None:
        self._sink = sink
        self._left = cap_bytes
        self.over = trio.Event()

    async def put(self, stream: Stream, data: bytes) -> None:
        """Pass bytes on, or say that the cap is passed; the run is ended by `enforce_log`."""
        kept = data[: self._left]
        self._left -= len(kept)
        for start in range(0, len(kept), limits.LOG_CHUNK_BYTES_MAX):
            await self._sink(stream, kept[start : start + limits.LOG_CHUNK_BYTES_MAX])
        if len(kept) < len(data):
            self.over.set()

    async def pump(self, stream: Stream, source: trio.abc.ReceiveStream) -> None:
        """Everything from a guest's pipe; over the cap it is read and dropped."""
        async with source:
            async for data in source:
                await self.put(stream, bytes(data))


async def enforce_log(gate: LogGate, end: End) -> None:
    """End the run once it has printed too much; it is read on meanwhile, so that it can end."""
    await gate.over.wait()
    await end("killed_log")


async def enforce_deadline(clock: RunClock, wall_s: float, end: End) -> None:
    """End the run when its wall time is used up."""
    await clock.reach(wall_s)
    await end("killed_deadline")


async def enforce_disk(
    folder: Path,
    disk_bytes: int,
    end: End,
    *,
    files_max: int = limits.SCRATCH_FILES_MAX,
    use: DiskUse | None = None,
) -> None:
    """End the run when it holds more disk or files than it may, seen by looking often.

    `use` says what it holds; without it the folder is walked.
    """
    look = use or partial(disk_use, folder, files_max=files_max)
    pause_s = DISK_POLL_S
    while True:
        await trio.sleep(pause_s)
        began = trio.current_time()
        reason = await trio.to_thread.run_sync(
            _over, look, disk_bytes, files_max, abandon_on_cancel=True
        )
        if reason:
            await end(reason)
            return
        share_s = DISK_POLL_SHARE * (trio.current_time() - began)
        pause_s = min(max(DISK_POLL_S, share_s), DISK_POLL_S_MAX)


def disk_reason(spec: JobSpec) -> str:
    """Why a run that has just failed did so, if its disk says so: a killed_* code, or "". Blocks.

    The volume has more room than the job may use, so one that met its end is over the limit.
    """
    bounds = spec.limits
    look = spec.disk_use or partial(disk_use, spec.outputs, files_max=bounds.scratch_files)
    return _over(look, bounds.disk_bytes, bounds.scratch_files)


def _over(look: DiskUse, disk_bytes: int, files_max: int) -> str:
    try:
        used, files = look()
    except FileNotFoundError:  # the folder goes with the run's end
        return ""
    if used > disk_bytes:
        return "killed_disk"
    return "killed_inodes" if files > files_max else ""
