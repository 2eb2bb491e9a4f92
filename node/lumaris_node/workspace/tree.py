"""Walking a tree that a stranger filled, by directory descriptors: no link is ever followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lumaris_protocol import limits

# A bound on what we open at once: one descriptor for each level.
DEPTH_MAX = 64
BLOCK_BYTES = 512


@dataclass(frozen=True)
class Entry:
    """One name in a stranger's tree: its relative path, its own status, and where to open it."""

    path: str
    status: os.stat_result
    folder: int
    name: str
    depth: int


class TreeTooDeepError(Exception):
    """The tree has more levels than are walked."""


class TreeClosedError(TreeTooDeepError):
    """The tree has a folder that may not be read, as a guest of this process's user can make."""


@contextmanager
def opened(root: Path) -> Iterator[int]:
    """The root's descriptor; the root itself is ours and may be a path."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def walk(root: int) -> Iterator[Entry]:
    """Every entry below, folders before their contents. Raises TreeTooDeepError, TreeClosedError.

    `folder` of an entry is open only until the next one is asked for.
    """
    yield from _walk(root, "", 0)


def _walk(folder: int, prefix: str, depth: int) -> Iterator[Entry]:
    if depth > DEPTH_MAX:
        raise TreeTooDeepError
    with os.scandir(folder) as names:
        for item in names:
            try:
                status = os.stat(item.name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                continue  # a running guest removes as it likes
            path = prefix + item.name
            yield Entry(path, status, folder, item.name, depth)
            if stat.S_ISDIR(status.st_mode):
                try:
                    inner = open_folder(item.name, folder)
                except PermissionError as error:  # what is not seen would count as nothing
                    raise TreeClosedError from error
                except OSError:
                    continue  # gone, or swapped for a link since
                try:
                    yield from _walk(inner, f"{path}/", depth + 1)
                finally:
                    os.close(inner)


def open_folder(name: str, folder: int) -> int:
    """A folder inside a folder, refusing a link put in its place."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def disk_use(root: Path, *, files_max: int = limits.SCRATCH_FILES_MAX) -> tuple[int, int]:
    """Bytes of disk and number of entries below `root`; counting stops above `files_max`.

    A tree that is too deep to walk, or closed to us, counts as too many files.
    """
    size = count = 0
    try:
        with opened(root) as fd:
            for entry in walk(fd):
                count += 1
                size += entry.status.st_blocks * BLOCK_BYTES
                if count > files_max:
                    break
    except TreeTooDeepError:
        return size, files_max + 1
    return size, count
