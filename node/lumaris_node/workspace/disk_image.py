"""A file system of its own in a file: sparse, without a journal, on a loop device.

The file has no name once it is attached, so that a node that dies leaves a mount and nothing else;
the device and the space go with the mount. Guests may run what they wrote: a job builds programs
and runs them; set-user-id bits and devices mean nothing here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from lumaris_node.workspace import fscrypt
from lumaris_node.workspace.mounts import (
    MS_NOATIME,
    MS_NODEV,
    MS_NOSUID,
    attach_loop,
    mount,
    unmount,
)
from lumaris_node.workspace.volume import MountedVolume
from lumaris_node.workspace.wipe import wipe
from lumaris_protocol.limits import MIB

_INODE_BYTES: Final = 256
# What the kernel keeps back (at most 4,096 blocks), block maps and descriptors of small disks.
_OVERHEAD_BYTES: Final = 24 * MIB
_OVERHEAD_PART: Final = 1000  # and a thousandth of large ones
_MKFS_S: Final = 60.0
# Nothing here outlives a power cut, so nothing waits for the platter; the tables are zero already.
_OPTIONS: Final = "barrier=0,noinit_itable"
_SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"


def mount_image(folder: Path, *, bytes_max: int, files_max: int, features: str = "") -> Path:
    """Mount a fresh file system at `folder/disk` with room for so much; that path.

    Raises OSError.
    """
    image, target = folder / "image", folder / "disk"
    target.mkdir(mode=0o700)
    itable = files_max * _INODE_BYTES
    size = (bytes_max + itable + _OVERHEAD_BYTES) * (_OVERHEAD_PART + 1) // _OVERHEAD_PART
    with open(os.open(image, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.truncate(-(-size // MIB) * MIB)
    try:
        _format(image, files_max, features)
        device, fd = attach_loop(image)
        try:
            flags = MS_NOSUID | MS_NODEV | MS_NOATIME
            mount(device, target, "ext4", flags, _OPTIONS)
        finally:
            os.close(fd)
    finally:
        image.unlink()
    status = os.statvfs(target)
    if status.f_bavail * status.f_frsize < bytes_max or status.f_favail < files_max:
        raise OSError("the file system came out smaller than asked for")
    return target


def _format(image: Path, files_max: int, features: str) -> None:
    program = shutil.which("mkfs.ext4", path=_SYSTEM_PATH)
    if program is None:
        raise OSError("mkfs.ext4 is not installed")
    inodes = files_max + 64  # some are the file system's own
    command = [program, "-q", "-F", "-m", "0", "-b", "4096", "-I", str(_INODE_BYTES)]
    command += ["-N", str(inodes), "-O", f"^has_journal,^resize_inode{features}"]
    command += ["-E", "lazy_itable_init=1,nodiscard", str(image)]
    try:
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=_MKFS_S
        )
    except subprocess.SubprocessError as error:
        raise OSError(f"mkfs.ext4 failed: {error}") from error


class FscryptVolume(MountedVolume):
    """Encrypted by ext4 itself under a key that only the kernel holds."""

    kind = "fscrypt"
    _key: bytes | None = None

    def _make(self) -> None:
        mount_image(
            self.folder,
            bytes_max=self.bytes_max,
            files_max=self.files_max,
            features=",encrypt",
        )
        self.path.mkdir(mode=0o700)
        self._key = fscrypt.encrypt_folder(self.path)

    def _unmake(self) -> None:
        target, key, self._key = self.folder / "disk", self._key, None
        with contextlib.suppress(OSError):
            wipe(self.path)  # or else the kernel encrypts and writes it all before it forgets
        try:
            if key is not None:
                fscrypt.forget_key(target, key)
        finally:
            unmount(target)
