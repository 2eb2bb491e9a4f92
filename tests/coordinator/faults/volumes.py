"""A real ext4 file system on a loop device, whose power and whose disk a test can take away."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

# <linux/loop.h>: struct loop_info64, whose field at 32 is the limit of the device's size.
_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_INFO_BYTES: Final = 232
_LIMIT_AT: Final = 32
# <linux/fs.h>: FS_IOC_SHUTDOWN, with which file systems are tested for power cuts. 2 is NOLOGFLUSH.
_SHUTDOWN: Final = 0x8004587D
_NOLOGFLUSH: Final = 2
_SIZE: Final = 32 * 1024 * 1024
# A file system whose disk fails can wait for ever in the kernel: then the disk comes back.
_FAIL_S_MAX: Final = 10.0


@dataclass
class Disk:
    """A mounted file system."""

    image: Path
    mount: Path
    device: str = ""

    @property
    def state(self) -> Path:
        """A coordinator's folder on it."""
        return self.mount / "state"

    def attach(self) -> None:
        """Mount what the device holds: a journal is replayed, as at a start of the machine."""
        self.device = _run("losetup", "--find", "--show", str(self.image))
        try:
            _run("mount", "-o", "errors=continue", self.device, str(self.mount))
        except BaseException:
            _run("losetup", "--detach", self.device)
            raise

    def detach(self) -> None:
        """Unmount; what was not written before a power cut is gone."""
        try:
            _run("umount", str(self.mount))
        except subprocess.CalledProcessError:  # a test failed with files of it open
            _run("umount", "--lazy", str(self.mount))
        _run("losetup", "--detach", self.device)

    def restart(self) -> None:
        """The machine is on again."""
        self.detach()
        self.attach()

    def cut_power(self) -> None:
        """From now on nothing reaches the device, not even what waits in memory for its turn."""
        folder = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
        finally:
            os.close(folder)

    def turn_read_only(self) -> None:
        """What ext4 does by itself when it finds its own tables damaged."""
        _run("mount", "-o", "remount,abort,errors=remount-ro", str(self.mount))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """The device refuses to read and to write: each sync is told so, once."""
        watchdog = threading.Timer(_FAIL_S_MAX, self._limit, (0,))
        watchdog.start()
        self._limit(512)
        try:
            yield
        finally:
            watchdog.cancel()
            self._limit(0)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a block is free."""
        ballast = self.mount / "ballast"
        with ballast.open("wb") as file:
            for size in (1024 * 1024, 4096):
                with suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
        try:
            yield
        finally:
            ballast.unlink()

    def _limit(self, size: int) -> None:
        device = os.open(self.device, os.O_RDWR)
        try:
            info = bytearray(_INFO_BYTES)
            fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
            struct.pack_into("Q", info, _LIMIT_AT, size)
            fcntl.ioctl(device, _LOOP_SET_STATUS64, bytes(info))
        finally:
            os.close(device)


@contextmanager
def disk(folder: Path, *, journal: bool = True) -> Iterator[Disk]:
    """A new disk. Without root or loop devices the test is skipped, or fails where required.

    A file system with a journal is read-only for good after its disk failed; without, it goes on.
    """
    found = Disk(folder / "image", folder / "mount")
    found.mount.mkdir()
    with found.image.open("wb") as image:
        image.truncate(_SIZE)
    options = () if journal else ("-O", "^has_journal")
    try:
        _run("mkfs.ext4", "-q", "-F", "-m", "0", *options, str(found.image))
        found.attach()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"needs root, loop devices and mkfs.ext4: {error}"
        if os.environ.get("LUMARIS_REQUIRE_VOLUMES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield found
    finally:
        found.detach()


def _run(program: str, *arguments: str) -> str:
    found = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise FileNotFoundError(program)
    return subprocess.run(
        [found, *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
