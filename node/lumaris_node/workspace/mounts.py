"""The system calls behind a volume: mounting, loop devices, and what is mounted below a folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import re
import stat
import struct
import time
from pathlib import Path
from typing import Final

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOATIME: Final = 1024
_MNT_DETACH: Final = 2
_LOOP_MAJOR: Final = 7
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LO_FLAGS_AUTOCLEAR: Final = 4
_SECTOR_BYTES: Final = 4096
# struct loop_config of <linux/loop.h>: fd, block size, struct loop_info64, eight reserved words.
_LOOP_CONFIG: Final = struct.Struct("=II" + "QQQQQIIII64s64s32sQQ" + "64x")
_LOOP_TRIES: Final = 64  # others may take the free device between our two calls
# What was killed a moment ago may still hold the mount; after that it is detached and goes alone.
_UNMOUNT_TRIES: Final = 10
_UNMOUNT_PAUSE_S: Final = 0.02


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode())
    if _libc().mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def unmount(target: Path) -> None:
    """Unmount, or detach what is still in use. Not being mounted is no error; raises OSError."""
    for _ in range(_UNMOUNT_TRIES):
        try:
            return _umount(target, 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # no mount, or no such folder
                return None
            if error.errno != errno.EBUSY:
                break
        time.sleep(_UNMOUNT_PAUSE_S)
    return _umount(target, _MNT_DETACH)


def _umount(target: Path, flags: int) -> None:
    if _libc().umount2(os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def attach_loop(image: Path) -> tuple[str, int]:
    """A loop device over a file, and its descriptor: the device goes when it is closed and unused.

    Raises OSError.
    """
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    control = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        for _ in range(_LOOP_TRIES):
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            fd = _configure(device, backing)
            if fd >= 0:
                return device, fd
    finally:
        os.close(backing)
        if control >= 0:
            os.close(control)
    raise OSError(errno.EBUSY, "no free loop device")


def _configure(device: str, backing: int) -> int:
    if not os.path.exists(device):  # a minimal /dev has only the first few
        number = int(device.removeprefix("/dev/loop"))
        os.mknod(device, stat.S_IFBLK | 0o660, os.makedev(_LOOP_MAJOR, number))
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    info = (0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, _SECTOR_BYTES, *info))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            return -1
        raise
    return fd


def mounts_below(folder: Path) -> list[Path]:
    """What is mounted below a folder of ours, the innermost and latest first."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    root = os.path.realpath(folder) + "/"
    found = [os.fsdecode(_unescape(line.split(b" ")[4])) for line in lines]
    return [Path(target) for target in reversed(found) if target.startswith(root)]


def _unescape(name: bytes) -> bytes:
    return re.sub(rb"\\(\d{3})", lambda match: bytes([int(match[1], 8)]), name)
