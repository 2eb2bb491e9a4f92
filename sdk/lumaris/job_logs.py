"""What jobs print, kept in their folders as it arrives: a program that is killed leaves that much.

Written behind, in batches; at a job's end its whole log replaces what was appended.
"""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from lumaris.jobs import LogLine

log = logging.getLogger(__name__)

_STREAMS = ("stdout", "stderr")


class JobLogs:
    """The logs below `folder`, one folder for each job. Sizes are bounded by the jobs' limits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unwritten: dict[tuple[str, str], bytearray] = {}  # by job and stream
        self._writing = trio.Lock()

    def add(self, line: LogLine) -> None:
        """Take output that has arrived; `flush` writes it."""
        self._unwritten.setdefault((line.job, line.stream), bytearray()).extend(line.data)

    async def flush(self) -> None:
        """Append what has arrived. A full disk is logged: it must not end the session."""
        async with self._writing:
            parts, self._unwritten = self._unwritten, {}
            if parts:
                await trio.to_thread.run_sync(self._append, parts)

    async def forget(self, job: str) -> None:
        """A new attempt prints everything anew."""
        async with self._writing:
            self._drop(job)
            await trio.to_thread.run_sync(self._remove, job)

    async def finish(self, job: str, stdout: bytes, stderr: bytes) -> None:
        """The whole log of a job that has ended. Raises OSError."""
        async with self._writing:
            self._drop(job)
            if stdout or stderr:
                await trio.to_thread.run_sync(self._write, job, stdout, stderr)

    def _drop(self, job: str) -> None:
        for stream in _STREAMS:
            self._unwritten.pop((job, stream), None)

    def _append(self, parts: dict[tuple[str, str], bytearray]) -> None:
        for (job, stream), data in parts.items():
            path = self._folder / job / stream
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(data)
            except OSError as error:
                log.warning("log not kept path=%s error=%r", path, error)

    def _write(self, job: str, stdout: bytes, stderr: bytes) -> None:
        folder = self._folder / job
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stdout").write_bytes(stdout)
        (folder / "stderr").write_bytes(stderr)

    def _remove(self, job: str) -> None:
        for stream in _STREAMS:
            (self._folder / job / stream).unlink(missing_ok=True)
