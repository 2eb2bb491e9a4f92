"""Volumes that never touch a disk: a tmpfs of their own, or a folder in shared memory."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from lumaris_node.workspace.mounts import MS_NODEV, MS_NOSUID, mount
from lumaris_node.workspace.volume import FolderVolume, MountedVolume

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - one closed folder of ours in it


class TmpfsVolume(MountedVolume):
    """A tmpfs with a size and a number of files."""

    kind = "tmpfs"
    memory_backed = True

    def _make(self) -> None:
        target = self.folder / "disk"
        target.mkdir(mode=0o700)
        options = f"size={self.bytes_max},nr_inodes={self.files_max + 8},mode=0700"
        try:
            mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"{options},noswap")
        except OSError as error:
            # Kernels before 6.4 do not know it; without swap there is nothing to forbid.
            if error.errno != errno.EINVAL or _swaps():
                raise
            mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, options)
        self.path.mkdir(mode=0o700)


class MemoryVolume(FolderVolume):
    """A closed folder in shared memory, for a node that may mount nothing."""

    kind = "memory"
    memory_backed = True

    def _make(self) -> None:
        if self.folder.parent != SHARED_MEMORY or _swaps():
            raise OSError("shared memory may be swapped to a disk")
        super()._make()


class PlainVolume(FolderVolume):
    """A folder on the disk, neither encrypted nor bounded: only where the owner asks for it."""

    kind = "plain"


def _swaps() -> bool:
    try:
        return len(Path("/proc/swaps").read_text(encoding="ascii").splitlines()) > 1
    except OSError:
        return True
