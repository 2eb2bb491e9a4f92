"""Disks of virtual machines: file systems that we make and the guest alone mounts.

Nothing that a guest wrote is ever mounted here. A job's own disks lie beside its folders, where
the workspace is encrypted and bounded, and have no name: they vanish with the last descriptor.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from lumaris_node.images.rootfs import RootfsStore
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

MAKE_S_MAX = 600
_BLOCK = 4096
_INODE_BYTES = 256
_SPARE_BYTES = 16 * limits.MIB
_SPARE_FILES = 256
# Named one by one: what a machine's own mke2fs.conf adds, an older guest kernel may not know.
_FEATURES = "none,filetype,extent,sparse_super,large_file,huge_file,dir_nlink,flex_bg,uninit_bg"
_ENTRIES_MAX = 2_000_000


class ImageDisks:
    """Read-only disks of images, one file each in `directory`; kept as long as the image is."""

    def __init__(self, directory: Path, rootfs: RootfsStore) -> None:
        self._directory, self._rootfs = directory, rootfs

    def open(self, image: str) -> int:
        """A descriptor of the image's disk, made at its first use. Blocks.

        Raises LumarisError `bad_image`, `platform_error`.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._directory / image.removeprefix("sha256:")
        with self._rootfs.pin(image) as root:
            if not target.exists():
                self._drop_unused()
                descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=self._directory)
                os.close(descriptor)
                try:
                    _fill(Path(name), root)
                    os.replace(name, target)
                finally:
                    Path(name).unlink(missing_ok=True)
            return os.open(target, os.O_RDONLY | os.O_CLOEXEC)

    def remove(self, image: str) -> None:
        """Forget an image's disk; machines that have it open keep it."""
        (self._directory / image.removeprefix("sha256:")).unlink(missing_ok=True)

    def _drop_unused(self) -> None:
        kept = {image.removeprefix("sha256:") for image in self._rootfs.digests()}
        for path in self._directory.iterdir():
            if path.name not in kept and not path.name.startswith(".draft-"):
                path.unlink(missing_ok=True)

    def drop_drafts(self) -> None:
        """Remove what a killed predecessor was making. Only before any use."""
        with contextlib.suppress(OSError):
            for path in self._directory.glob(".draft-*"):
                path.unlink(missing_ok=True)


def folder_disk(folder: Path, near: Path) -> int:
    """A nameless read-only disk with a folder's content, made in `near`. Blocks.

    Raises LumarisError `platform_error`.
    """
    descriptor, name = tempfile.mkstemp(prefix=".disk-", dir=near)
    os.close(descriptor)
    try:
        _fill(Path(name), folder)
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.unlink(name)


def blank_disk(*, size_bytes: int, files: int, near: Path) -> int:
    """A nameless empty disk, a little larger than said: the guest reports who passes the limit.

    Raises LumarisError `platform_error`.
    """
    descriptor, name = tempfile.mkstemp(prefix=".disk-", dir=near)
    try:
        inodes = files + _SPARE_FILES
        _make(Path(name), size_bytes + size_bytes // 16 + inodes * _INODE_BYTES, inodes)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        os.unlink(name)
    return descriptor


def _fill(disk: Path, folder: Path) -> None:
    """Make `disk` a file system that holds what `folder` does."""
    size, entries = 0, 0
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                status = entry.stat(follow_symlinks=False)
                size += -(-status.st_size // _BLOCK) * _BLOCK + _BLOCK
                entries += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                if entries > _ENTRIES_MAX:
                    raise LumarisError("platform_error", "Too many files for a disk.")
    inodes = entries + _SPARE_FILES
    _make(disk, size + size // 32 + inodes * _INODE_BYTES, inodes, "-d", str(folder.absolute()))


def _make(disk: Path, size_bytes: int, inodes: int, *more: str) -> None:
    """Make a sparse file a file system; its unused size costs nothing."""
    kib = (size_bytes + _SPARE_BYTES) // 1024
    command = (
        "mkfs.ext4", "-q", "-F", "-b", str(_BLOCK), "-I", str(_INODE_BYTES), "-m", "0",
        "-O", _FEATURES, "-N", str(inodes), "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
        *more, str(disk), f"{kib}k",
    )  # fmt: skip
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=MAKE_S_MAX,
            check=False,
            env={"PATH": path, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LumarisError("platform_error", f"No disk was made: {error}") from error
    if done.returncode != 0:
        text = done.stderr.decode("utf-8", "replace")[-300:]
        raise LumarisError("platform_error", f"No disk was made: {text}")
