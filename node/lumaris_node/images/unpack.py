"""Laying the layers of an image over one another in a folder, as a stranger's archive says.

The folder is ours alone while this runs, so a name is resolved here, part by part, with a
descriptor for each folder and no link followed by the kernel: a link in the image leads to where
it would inside the image, and nowhere else. Counts and bytes are charged before they are written.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import deque
from collections.abc import Set
from typing import Final

from lumaris_overlay.tar import Member, Reader, TarReader, unsafe
from lumaris_protocol.limits import IMAGE_BYTES_MAX

# Files of a whole image; a distribution with a compiler and scientific libraries has 60,000.
ENTRIES_MAX: Final = 400_000
DEPTH_MAX: Final = 64
_LINKS_FOLLOWED_MAX = 40  # as many as the kernel follows
_FOLLOWED_IN_ALL_MAX = 4 * ENTRIES_MAX
_BLOCK_BYTES = 4096
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unpacker:
    """Unpacks layers, the lowest first, below the folder that `root` is open on. Blocks.

    Every file ends up owned by this process's user, readable by all, without setuid or setgid.
    Devices and pipes are left out. Raises LumarisError `unsafe_archive`; what was written stays.
    """

    def __init__(self, root: int, *, bytes_max: int = IMAGE_BYTES_MAX) -> None:
        self._root, self._left, self._entries = root, bytes_max, 0
        self._followed = 0
        self._made: dict[int, set[str]] = {}  # names this layer made, by their folder's inode
        self._cleared: set[int] = set()  # folders that have nothing of lower layers any more
        self._at: tuple[str, ...] | None = None  # the folder that `_folder` is open on
        self._folder = -1
        self.bytes = 0  # what it takes on the disk, about

    def add_layer(self, source: Reader) -> None:
        """Lay a layer's tar over what is here."""
        self._made, self._cleared = {}, set()
        tar = TarReader(source, members_max=ENTRIES_MAX)
        try:
            for member in tar:
                self._charge(member)
                self._take(member, tar)
        except OSError as error:
            raise unsafe(f"cannot be unpacked here ({error.strerror})") from error
        finally:
            self._leave()

    def _charge(self, member: Member) -> None:
        self._entries += 1
        cost = _BLOCK_BYTES + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
        self._left -= cost
        self.bytes += cost
        if self._entries > ENTRIES_MAX or self._left < 0:
            raise unsafe("unpacks to more files or bytes than an image may have")

    def _take(self, member: Member, tar: TarReader) -> None:
        parts = _parts(member.name)
        if not parts:  # the root itself
            return
        folder, name = self._enter(parts[:-1]), parts[-1]
        if name.startswith(_WHITEOUT):
            self._whiteout(folder, name)
            return
        if member.kind == "special":
            return
        if member.kind == "folder":
            self._make_folder(folder, name)
        elif member.kind == "hardlink":
            self._link(folder, name, _parts(member.link))
        elif member.kind == "symlink":
            self._remove(folder, name)
            os.symlink(member.link, name, dir_fd=folder)
        else:
            self._write(folder, name, member, tar)
        self._mark(folder, name)

    def _mark(self, folder: int, name: str) -> None:
        """This layer has the name, so its whiteouts do not mean it."""
        self._made.setdefault(os.fstat(folder).st_ino, set()).add(name)

    def _make_folder(self, folder: int, name: str) -> None:
        status = _status(folder, name)
        if status is None or not stat.S_ISDIR(status.st_mode):
            self._remove(folder, name)
            os.mkdir(name, dir_fd=folder)
        inner = os.open(name, _FOLDER, dir_fd=folder)
        try:
            os.fchmod(inner, 0o755)
        finally:
            os.close(inner)

    def _write(self, folder: int, name: str, member: Member, tar: TarReader) -> None:
        self._remove(folder, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=folder), "wb", buffering=0) as file:
            for piece in tar.data():
                if file.write(piece) != len(piece):
                    raise unsafe("does not fit on this disk")
            os.fchmod(file.fileno(), member.mode & 0o755 | 0o444)
            # Compiled modules of Python are good only beside a source of the time they name.
            os.utime(file.fileno(), (member.modified_s, member.modified_s))

    def _link(self, folder: int, name: str, target: tuple[str, ...]) -> None:
        """A hard link, to a file or symbolic link that is in the image already."""
        if not target:
            raise unsafe("has a link to nowhere")
        source = self._open(target[:-1], make=False)
        try:
            status, old = _status(source, target[-1]), _status(folder, name)
            if status is None or stat.S_ISDIR(status.st_mode):
                raise unsafe("has a hard link to what is not there")
            if old is not None and os.path.samestat(status, old):
                return
            self._remove(folder, name)
            names = {"src_dir_fd": source, "dst_dir_fd": folder}
            os.link(target[-1], name, **names, follow_symlinks=False)
        finally:
            os.close(source)

    # --- what a layer takes away ---

    def _whiteout(self, folder: int, name: str) -> None:
        """Remove what lower layers had under a name, or all they had in the folder."""
        if name == _OPAQUE:
            self._hide_lower(folder)
        elif not name.startswith(_WHITEOUT * 2):  # others of these are notes of old engines
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in ("", ".", ".."):
                raise unsafe("has a name that leads out of it")
            self._hide(folder, hidden, self._made.get(os.fstat(folder).st_ino, set()))

    def _hide(self, folder: int, name: str, made: Set[str]) -> None:
        if name not in made:
            self._remove(folder, name)
        elif stat.S_ISDIR(_stat(folder, name).st_mode):
            inner = os.open(name, _FOLDER, dir_fd=folder)
            try:
                self._hide_lower(inner)
            finally:
                os.close(inner)

    def _hide_lower(self, folder: int) -> None:
        """Leave of a folder only what this layer made; as deep as `_open` lets folders be.

        Once for each folder and layer: what comes into it later is this layer's own.
        """
        inode = os.fstat(folder).st_ino
        if inode in self._cleared:
            return
        self._cleared.add(inode)
        made = self._made.get(inode, set())
        for name in os.listdir(folder):
            self._hide(folder, name, made)

    def _remove(self, folder: int, name: str) -> None:
        status = _status(folder, name)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=folder)
            return
        self._at = None  # the next member's folder may have been below
        shutil.rmtree(name, dir_fd=folder)

    # --- where a name leads ---

    def _enter(self, parts: tuple[str, ...]) -> int:
        """The folder of a member, made if it is missing; archives stay in one for long."""
        if self._at != parts:
            self._leave()
            self._folder, self._at = self._open(parts, make=True), parts
        return self._folder

    def _leave(self) -> None:
        if self._folder >= 0:
            os.close(self._folder)
        self._folder, self._at = -1, None

    def _open(self, parts: tuple[str, ...], *, make: bool) -> int:
        """A descriptor of the folder that a path in the image leads to."""
        waiting, followed = deque(parts), 0
        path = [os.dup(self._root)]  # the folders from the root to here
        try:
            while waiting:
                part = waiting.popleft()
                if part == "..":
                    if len(path) > 1:
                        os.close(path.pop())
                    continue
                target = _target(path[-1], part)
                if target is None:
                    if make:
                        self._mark(path[-1], part)
                    path.append(_open_folder(path[-1], part, make=make))
                    if len(path) > DEPTH_MAX:
                        raise unsafe("has folders nested too deep")
                    continue
                followed += 1
                self._followed += 1
                if followed > _LINKS_FOLLOWED_MAX or self._followed > _FOLLOWED_IN_ALL_MAX:
                    raise unsafe("has links that lead in a circle")
                if target.startswith("/"):
                    while len(path) > 1:
                        os.close(path.pop())
                found = [item for item in target.split("/") if item not in ("", ".")]
                waiting.extendleft(reversed(found))
            return path.pop()
        finally:
            for descriptor in path:
                os.close(descriptor)


def _parts(name: str) -> tuple[str, ...]:
    """A member's name in parts. Raises LumarisError `unsafe_archive` when it leads out."""
    if name.startswith("/") or ".." in (parts := name.split("/")):
        raise unsafe("has a name that leads out of it")
    found = tuple(part for part in parts if part not in ("", "."))
    if len(found) > DEPTH_MAX:
        raise unsafe("has folders nested too deep")
    return found


def _target(folder: int, name: str) -> str | None:
    """Where a symbolic link leads; None for anything else."""
    status = _status(folder, name)
    if status is None or not stat.S_ISLNK(status.st_mode):
        return None
    return os.readlink(name, dir_fd=folder)


def _open_folder(folder: int, name: str, *, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise unsafe("has a hard link to what is not there") from None
        os.mkdir(name, dir_fd=folder)
        return os.open(name, _FOLDER, dir_fd=folder)
    except NotADirectoryError:
        raise unsafe("has a file where a folder must be") from None


def _stat(folder: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _status(folder: int, name: str) -> os.stat_result | None:
    try:
        return _stat(folder, name)
    except FileNotFoundError:
        return None
