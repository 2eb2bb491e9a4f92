"""What a volume is, whatever it is made of: a bounded folder for one lease, gone when closed."""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from lumaris_node.workspace.mounts import unmount
from lumaris_node.workspace.tree import disk_use
from lumaris_node.workspace.wipe import wipe
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)


class Volume(ABC):
    """A folder of its own for one lease, of `bytes_max` bytes and `files_max` files.

    `path` is the folder once `open` has returned. All methods block.
    """

    kind: ClassVar[str]
    memory_backed: ClassVar[bool] = False

    def __init__(self, folder: Path, *, bytes_max: int, files_max: int) -> None:
        self.folder, self.bytes_max, self.files_max = folder, bytes_max, files_max
        self.path = folder / "disk" / "data"
        self._empty = (0, 0)  # what the file system itself takes

    def open(self) -> None:
        """Make it. Raises LumarisError `volume_failed`, and nothing is left behind then."""
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            self._make()
            self._empty = self._measure()
        except OSError as error:
            self.close()
            raise LumarisError("volume_failed", f"No {self.kind} volume: {error}.") from error

    def used(self) -> tuple[int, int]:
        """Bytes and files that are in it now. Raises OSError when it is gone."""
        size, count = self._measure()
        return max(0, size - self._empty[0]), max(0, count - self._empty[1])

    def close(self) -> None:
        """Drop its key and remove it. Idempotent; what resists is left to the next `reap`."""
        try:
            self._unmake()
        except OSError as error:
            log.warning("a volume resists its end: %s: %s", self.folder.name, error)
        with contextlib.suppress(OSError):
            remove(self.folder)

    @abstractmethod
    def _make(self) -> None:
        """Make `path` inside `folder`. Raises OSError."""

    @abstractmethod
    def _unmake(self) -> None:
        """Make what it holds unreadable, then unmount. Raises OSError."""

    @abstractmethod
    def _measure(self) -> tuple[int, int]:
        """Bytes and files in use, its own included."""


class MountedVolume(Volume):
    """One with a file system of its own: the kernel bounds and counts it."""

    def _measure(self) -> tuple[int, int]:
        status = os.statvfs(self.path)
        return (
            (status.f_blocks - status.f_bfree) * status.f_frsize,
            status.f_files - status.f_ffree,
        )

    def _unmake(self) -> None:
        unmount(self.folder / "disk")


class FolderVolume(Volume):
    """A folder among others: watched, not bounded by the kernel."""

    def _make(self) -> None:
        self.path.mkdir(parents=True, mode=0o700)

    def _unmake(self) -> None:
        """A folder has no key; removing it is all."""

    def _measure(self) -> tuple[int, int]:
        return disk_use(self.path, files_max=self.files_max)


def remove(folder: Path) -> None:
    """Remove the folder of a volume, unless something is still mounted in it. Raises OSError."""
    for name in ("open", "disk"):
        if os.path.ismount(folder / name):
            raise OSError(f"{folder / name} is still mounted")
    wipe(folder)
