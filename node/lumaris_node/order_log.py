"""The log of one order as it is kept here, so that a reader can come back to where it was.

Most logs fit the memory kept for them; the rest of a longer one lies in two files of the lease's
volume, the bytes and beside them which stream each came from. Any number of readers follow at
their own pace and never hold up the writer.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from lumaris_node.executors.port import Stream
from lumaris_protocol.limits import KIB, LOG_BYTES_MAX, LOG_CHUNK_BYTES_MAX
from lumaris_protocol.protocols import LOG_STREAMS

log = logging.getLogger(__name__)

# What is kept in memory for each order: the whole log of most, and 32 MiB at most in all.
_HEAD_BYTES: Final = 64 * KIB
# One byte of the marks for each of the log.
_MARKS: Final = {stream: bytes([number]) for number, stream in LOG_STREAMS.items()}


class OrderLog:
    """Both output streams in the order they came. `size` counts their bytes together."""

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.size = 0
        self.ended = False
        self._path, self._bytes_max = path, bytes_max
        self._head, self._head_marks = bytearray(), bytearray()
        self._files: tuple[int, int] | None = None
        self._changed = trio.Event()
        self._readers = 0
        self._closed = False
        self._using = trio.Lock()  # the files are not closed while a thread uses them

    @property
    def settled(self) -> bool:
        """Whether it ended, nobody reads it and it is in memory only: then it closes by itself."""
        return self.ended and not self._readers and self._files is None

    async def append(self, stream: Stream, data: bytes) -> None:
        """Keep what a guest printed. What is over the cap, or finds no disk, is not kept."""
        async with self._using:
            data = data[: self._bytes_max - self.size]
            if not data or self.ended:
                return
            marks, room = _MARKS[stream] * len(data), _HEAD_BYTES - len(self._head)
            if len(data) > room:
                at = self.size + room - _HEAD_BYTES
                try:
                    await trio.to_thread.run_sync(self._spill, at, data[room:], marks[room:])
                except OSError as error:
                    log.warning("log not kept path=%s error=%r", self._path, error)
                    self._bytes_max = self.size  # a gap would be worse than an early end
                    return
            self._head += data[:room]
            self._head_marks += marks[:room]
            self.size += len(data)
            self._wake()

    async def read(self, offset: int) -> list[tuple[Stream, bytes]]:
        """The next bytes from `offset` on, at most LOG_CHUNK_BYTES_MAX, split by stream."""
        if offset < len(self._head):
            end = offset + LOG_CHUNK_BYTES_MAX
            data, marks = bytes(self._head[offset:end]), bytes(self._head_marks[offset:end])
        else:
            async with self._using:
                files = self._files
                if files is None:
                    return []
                at = offset - _HEAD_BYTES
                data, marks = await trio.to_thread.run_sync(_read, files, at)
        return list(_split(data, marks))

    async def more(self, offset: int) -> bool:
        """Wait until there is more than `offset` bytes; False when there will not be.

        Raises trio.BrokenResourceError when the rest is gone.
        """
        while self.size <= offset and not self.ended:
            await self._changed.wait()
        if self._closed and self.size > offset:
            raise trio.BrokenResourceError("the log was removed")
        return self.size > offset

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep it readable while the context lasts, also after its end."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._wake()

    def end(self) -> None:
        """The order is over: readers get the rest."""
        self.ended = True
        self._wake()

    async def aclose(self, *, within_s: float = 0) -> None:
        """Remove the files, once readers are done or `within_s` later; idempotent."""
        self.end()
        try:
            with trio.move_on_after(within_s):
                while self._readers:
                    await self._changed.wait()
        finally:
            self._closed = True
            self._wake()
            with trio.CancelScope(shield=True):
                await self._remove()

    def _spill(self, offset: int, data: bytes, marks: bytes) -> None:
        if self._files is None:
            if self._closed:
                return
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            first = os.open(self._path, flags, 0o600)
            try:
                self._files = first, os.open(self._marks_path, flags, 0o600)
            except OSError:
                os.close(first)
                raise
        for file, part in zip(self._files, (data, marks), strict=True):
            if os.pwrite(file, part, offset) != len(part):
                raise OSError("the log was not written")

    async def _remove(self) -> None:
        async with self._using:
            files, self._files = self._files, None
            if files is not None:
                await trio.to_thread.run_sync(_remove, files, (self._path, self._marks_path))

    @property
    def _marks_path(self) -> Path:
        return self._path.with_suffix(".streams")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _read(files: tuple[int, int], offset: int) -> tuple[bytes, bytes]:
    data, marks = (os.pread(file, LOG_CHUNK_BYTES_MAX, offset) for file in files)
    return data, marks


def _remove(files: tuple[int, int], paths: tuple[Path, Path]) -> None:
    for file, path in zip(files, paths, strict=True):
        os.close(file)
        path.unlink(missing_ok=True)


def _split(data: bytes, marks: bytes) -> Iterator[tuple[Stream, bytes]]:
    at = 0
    for mark, run in itertools.groupby(marks):
        size = sum(1 for _ in run)
        yield LOG_STREAMS[mark], data[at : at + size]
        at += size
