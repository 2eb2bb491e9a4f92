"""The file an unfinished transfer writes to, beside its target."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lumaris_overlay.bulk.wire import chunk_bytes, chunks_of
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import CHUNK_BYTES

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Part:
    """Chunks of one file on disk. Blocking; one thread at a time; holds a lock on its file."""

    def __init__(self, path: Path, file: int, *, sha256: str, size_bytes: int) -> None:
        self.sha256, self.size_bytes = sha256, size_bytes
        self.count = chunks_of(size_bytes)
        self._path, self._file = path, file
        self.open = True

    @property
    def whole_chunks(self) -> int:
        """The chunks that an earlier attempt may have left, right or wrong."""
        size = os.fstat(self._file).st_size
        return self.count if size == self.size_bytes else min(size // CHUNK_BYTES, self.count)

    def write(self, index: int, data: memoryview) -> None:
        """Write one chunk. Raises LumarisError `disk_short` or `not_writable`."""
        with disk_errors():
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], index * CHUNK_BYTES + done)

    def read(self, index: int, buffer: bytearray) -> memoryview:
        """One chunk that was written, in `buffer`. Raises LumarisError `not_writable`."""
        piece = memoryview(buffer)[: chunk_bytes(index, self.size_bytes)]
        with disk_errors():
            if os.preadv(self._file, [piece], index * CHUNK_BYTES) != len(piece):
                raise OSError(errno.EIO, "The part file became shorter.")
        return piece

    def truncate(self, chunks: int) -> None:
        """Forget all but the first chunks."""
        size_bytes = min(chunks * CHUNK_BYTES, self.size_bytes)
        with disk_errors():
            if os.fstat(self._file).st_size > size_bytes:
                os.truncate(self._file, size_bytes)

    def finish(self, target: Path) -> None:
        """Give the file its name. Raises LumarisError `not_writable`."""
        with disk_errors():
            self._path.rename(target)
        self._close()

    def keep(self, chunks: int) -> None:
        """End an attempt: the first chunks stay for the next one, if it can find them."""
        if not self.open:
            return
        if self._path.name != part_path(self._path, self.sha256).name:
            chunks = 0
        with suppress(OSError, LumarisError):
            self.truncate(chunks)
            if not chunks:
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        self.open = False
        os.close(self._file)


def open_part(target: Path, *, sha256: str, size_bytes: int) -> Part:
    """The part file of a target: an earlier attempt's, or a new one where that is in use.

    Raises LumarisError `disk_short` or `not_writable`.
    """
    with disk_errors():
        path = part_path(target, sha256)
        file = _open_earlier(path)
        if file is None:
            path = target.with_name(f".{secrets.token_hex(8)}.part")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(file).st_size > size_bytes:
                os.truncate(file, 0)
        except OSError:
            os.close(file)
            raise
    return Part(path, file, sha256=sha256, size_bytes=size_bytes)


def part_path(target: Path, sha256: str) -> Path:
    """Where an attempt to fetch this file leaves what it has."""
    return target.with_name(f".{sha256.removeprefix('sha256:')}.part")


def drop_part(target: Path, sha256: str) -> None:
    """Remove what an attempt has left, unless another one uses it. Blocking; never raises."""
    path = part_path(target, sha256)
    with suppress(OSError):
        file = _open_earlier(path, create=False)
        if file is not None:
            try:
                path.unlink()
            finally:
                os.close(file)


def _open_earlier(path: Path, *, create: bool = True) -> int | None:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return None  # a link, a folder or a device: nothing of ours
        raise
    try:
        found = os.fstat(file)
        ours = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
        if ours:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another attempt may have given it its name, or removed it, before it let the lock go.
            ours = os.path.samestat(os.lstat(path), os.fstat(file))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if ours:
        return file
    os.close(file)
    return None


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns the disk's failures into what a user reads. No path of ours is told to a peer."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise LumarisError("disk_short", "The disk has no room for the file.") from None
        raise LumarisError("not_writable", f"The file: {error.strerror}.") from None


def chunk_list(file: int, size_bytes: int, stopped: threading.Event | None = None) -> bytes:
    """The hashes of an open file's beginnings, 32 bytes each; the last is the file's own.

    Raises EOFError when the file is shorter; ends early, with less, when `stopped` is set.
    """
    hasher, found = hashlib.sha256(), bytearray()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, size_bytes)))
    for index in range(chunks_of(size_bytes)):
        if stopped is not None and stopped.is_set():
            break
        piece = buffer[: chunk_bytes(index, size_bytes)]
        if os.preadv(file, [piece], index * CHUNK_BYTES) != len(piece):
            raise EOFError("The file became shorter.")
        hasher.update(piece)
        found += hasher.digest()
    return bytes(found)
