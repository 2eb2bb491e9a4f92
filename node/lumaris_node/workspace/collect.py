"""Reads what a guest left in /out, trusting nothing in it: plain files only, counted and hashed."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lumaris_node.workspace.tree import (
    BLOCK_BYTES,
    Entry,
    TreeClosedError,
    TreeTooDeepError,
    opened,
    walk,
)
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.paths import safe_parts

CHUNK_BYTES = 1024 * 1024
# File systems round up and delay allocation; a file this much larger than its blocks is sparse.
SPARSE_SLACK_BYTES = 64 * 1024


@dataclass(frozen=True)
class OutputFile:
    """A collected file: its path below /out, its size in bytes and `sha256:` digest."""

    path: str
    size: int
    digest: str


def collect_outputs(
    root: Path, *, files_max: int, bytes_max: int, file_bytes_max: int = limits.FILE_BYTES_MAX
) -> tuple[OutputFile, ...]:
    """Every file below `root`, sorted by path. Blocks; the guest must have ended.

    Raises LumarisError `killed_output` for links, special files, sparse files, odd names, or more
    than the bounds allow.
    """
    found: list[OutputFile] = []
    total = entries = 0
    try:
        with opened(root) as fd:
            for entry in walk(fd):
                entries += 1
                if entries > limits.SCRATCH_FILES_MAX:
                    raise _refused(entry, "is one file or folder too many")
                _check(entry)
                if stat.S_ISDIR(entry.status.st_mode):
                    continue
                total += entry.status.st_size
                if len(found) >= files_max or total > bytes_max:
                    raise _refused(entry, f"exceeds {files_max} files or {bytes_max} bytes in all")
                if entry.status.st_size > file_bytes_max:
                    raise _refused(entry, f"is larger than {file_bytes_max} bytes")
                found.append(_read(entry))
    except TreeClosedError as error:
        raise LumarisError("killed_output", "An output folder cannot be read.") from error
    except TreeTooDeepError as error:
        raise LumarisError("killed_output", "The output folders are nested too deep.") from error
    return tuple(sorted(found, key=lambda file: file.path))


def open_output(root: Path, path: str) -> int:
    """A descriptor of a collected file, following no link. Raises OSError when it changed."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        *parents, name = safe_parts(path)
        for parent in parents:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(parent, flags, dir_fd=folder)
            os.close(folder)
            folder = inner
        return _open_file(name, folder)
    finally:
        os.close(folder)


def _refused(entry: Entry, why: str) -> LumarisError:
    name = entry.path[:80].encode(errors="backslashreplace").decode()
    return LumarisError("killed_output", f"The output {name!r} {why}.")


def _check(entry: Entry) -> None:
    try:
        safe_parts(entry.path)
    except LumarisError as error:
        raise _refused(entry, "has a name or depth that is not accepted") from error
    status = entry.status
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise _refused(entry, "is a link or a special file")
    if status.st_nlink != 1:
        raise _refused(entry, "has a second name")
    if status.st_size > status.st_blocks * BLOCK_BYTES + SPARSE_SLACK_BYTES:
        raise _refused(entry, "is sparse")


def _open_file(name: str, folder: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def _read(entry: Entry) -> OutputFile:
    try:
        fd = _open_file(entry.name, entry.folder)
    except OSError as error:
        raise _refused(entry, "cannot be read") from error
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_dev) != (entry.status.st_ino, entry.status.st_dev):
            raise _refused(entry, "was replaced while it was read")
        seen, size = hashlib.sha256(), 0
        while chunk := os.read(fd, CHUNK_BYTES):
            size += len(chunk)
            if size > entry.status.st_size:
                break
            seen.update(chunk)
        if size != entry.status.st_size:
            raise _refused(entry, "changed while it was read")
        return OutputFile(entry.path, size, f"sha256:{seen.hexdigest()}")
    finally:
        os.close(fd)
