"""Encryption by gocryptfs (FUSE) over a bounded disk image, where ext4 itself cannot encrypt."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from lumaris_node.workspace.disk_image import mount_image
from lumaris_node.workspace.mounts import unmount
from lumaris_node.workspace.volume import MountedVolume

_KEY_BYTES: Final = 32
_START_S: Final = 10.0  # it takes 10 ms; a machine that swaps takes longer
# Names need no salt for each folder: the key is this lease's alone. All users may enter, as the
# guest is another one; the folder above is closed to everyone.
_FLAGS: Final = (
    *("-q", "-nosyslog", "-deterministic-names"),
    *("-allow_other", "-nosuid", "-nodev"),
)


class GocryptfsVolume(MountedVolume):
    """The key goes to the process through a pipe; neither a disk nor a command line sees it."""

    kind = "gocryptfs"

    def __init__(self, folder: Path, *, bytes_max: int, files_max: int) -> None:
        super().__init__(folder, bytes_max=bytes_max, files_max=files_max)
        self.path = folder / "open" / "data"

    def _make(self) -> None:
        program = shutil.which("gocryptfs")
        if program is None:
            raise OSError("gocryptfs is not installed")
        disk = mount_image(self.folder, bytes_max=self.bytes_max, files_max=self.files_max)
        cipher = disk / "data"
        target = self.folder / "open"
        for folder in (cipher, target):
            folder.mkdir(mode=0o700)
        # It goes into the background once it is ready. Before that nobody may touch the mount: its
        # own first file would wait for our request, and our request for it, for ever.
        try:
            subprocess.run(
                [program, *_FLAGS, "-masterkey=stdin", str(cipher), str(target)],
                check=True,
                input=os.urandom(_KEY_BYTES).hex().encode() + b"\n",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt at the terminal is not meant for it
                timeout=_START_S,
            )
        except subprocess.SubprocessError as error:
            raise OSError(f"gocryptfs failed: {error}") from error
        self.path.mkdir(mode=0o700)

    def _unmake(self) -> None:
        try:
            unmount(self.folder / "open")  # the process ends with its mount
        finally:
            unmount(self.folder / "disk")
