"""The files a buyer sent for one session: taken only when waited for, kept while there is room.

They are named by their hashes, so that the orders of a session may share them. What is kept counts
against the disk of the agreement, and the oldest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from lumaris_overlay.bulk.part import part_path
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.serve import take_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import INPUT_ALLOWANCE_BYTES, INPUT_FILES_MAX
from lumaris_protocol.messages.execution import File
from lumaris_protocol.protocols import BlobHeader, BlobReply

# Kept for later orders beside those of the one that runs; each costs an inode.
_FILES_MAX = 4 * INPUT_FILES_MAX


class Inputs:
    """The input files of one session, in `folder`. One order at a time uses them."""

    def __init__(
        self,
        folder: Path,
        *,
        disk_bytes: int,
        transfer_rate: Rate | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is told after a file came or went."""
        self._folder, self._transfer_rate = folder, transfer_rate
        self._on_change = on_change
        self._budget = disk_bytes + INPUT_ALLOWANCE_BYTES
        self._sizes: dict[str, int] = {}  # what is here, the least recently used first
        self._wanted: dict[str, tuple[int, trio.Event]] = {}
        self._arriving: set[str] = set()

    @property
    def kept_bytes(self) -> int:
        """What lies here."""
        return sum(self._sizes.values())

    def has(self, sha256: str) -> bool:
        """Whether the file is here."""
        return sha256 in self._sizes

    def path(self, sha256: str) -> Path:
        """Where the file is, or will be."""
        return self._folder / sha256.removeprefix("sha256:")

    def room(self, inputs: tuple[File, ...], *, disk_bytes: int, other_bytes: int) -> int:
        """Bytes left for other files beside an order and its inputs; may be < 0."""
        return self._budget - other_bytes - self.size_of(inputs) - disk_bytes

    def size_of(self, inputs: tuple[File, ...]) -> int:
        """Bytes that the inputs take here: a file that comes twice lies here once."""
        return sum({file.sha256: file.size_bytes for file in inputs}.values())

    async def trim(self, bytes_max: int, *, keep: Container[str] = ()) -> None:
        """Remove the files used longest ago, but for `keep`, until the rest is small enough."""
        for sha256 in list(self._sizes):
            if self.kept_bytes <= bytes_max and len(self._sizes) <= _FILES_MAX:
                return
            if sha256 not in keep:
                await self.drop(sha256)

    async def drop(self, sha256: str) -> None:
        """Remove a file."""
        if self._sizes.pop(sha256, None) is not None:
            try:
                await trio.Path(self.path(sha256)).unlink(missing_ok=True)
            finally:
                self._on_change()

    def use(self, file: File) -> Path:
        """The path of a file that is here. Raises LumarisError `bad_input` for a false size."""
        size_bytes = self._sizes.pop(file.sha256)
        self._sizes[file.sha256] = size_bytes  # now the one used last
        if size_bytes != file.size_bytes:  # room was made for the size that the order names
            raise LumarisError("bad_input", f"The size of {file.path[:80]!r} is another.")
        return self.path(file.sha256)

    @contextmanager
    def wanting(self, sizes_max: Mapping[str, int]) -> Iterator[None]:
        """Take these files from the buyer meanwhile, each no larger than given."""
        wanted = {name: (size, trio.Event()) for name, size in sizes_max.items()}
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = {}
            for sha256 in wanted.keys() - self._arriving:
                self._forget_part(sha256)

    async def arrived(self, sha256: str) -> None:
        """Until a wanted file is here."""
        await self._wanted[sha256][1].wait()

    async def take(self, header: BlobHeader, stream: FramedStream) -> None:
        """One upload. Raises RefusedError `bad_input`, `busy` or `oversize`, or EnvelopeError."""
        sha256, wanted = header.sha256, self._wanted.get(header.sha256)
        if not self.has(sha256):
            if wanted is None:
                raise RefusedError("bad_input", "No order waits for this file.")
            if header.size_bytes > wanted[0]:
                raise RefusedError("oversize", "The file is larger than the order says.")
            if sha256 in self._arriving:  # each would take its own space
                raise RefusedError("busy", "The file is being sent already.")
            self._arriving.add(sha256)
            try:
                await self._receive(header, stream)
            finally:
                self._arriving.remove(sha256)
        if wanted is not None:
            wanted[1].set()
        await stream.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="stored")))

    async def _receive(self, header: BlobHeader, stream: FramedStream) -> None:
        try:
            await take_file(stream, header, self.path(header.sha256), rate=self._transfer_rate)
            if header.sha256 not in self._wanted:
                raise RefusedError("bad_input", "No order waits for this file any more.")
            self._sizes[header.sha256] = header.size_bytes
        finally:
            if not self.has(header.sha256):  # it is not counted, so it must not lie here
                self.path(header.sha256).unlink(missing_ok=True)
                if header.sha256 not in self._wanted:
                    self._forget_part(header.sha256)
            self._on_change()

    def _forget_part(self, sha256: str) -> None:
        """Remove what an upload that was cut off has left for its next attempt."""
        part_path(self.path(sha256), sha256).unlink(missing_ok=True)
