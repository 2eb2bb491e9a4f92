"""Removing a tree that a stranger filled; links in it are removed, never followed.

Folders are moved to the top before they are emptied, so that depth costs neither descriptors nor
stack: a guest may nest thousands.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from lumaris_node.workspace.tree import open_folder


def wipe(root: Path) -> None:
    """Remove a folder of ours with everything in it. One that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        empty(root)
        root.rmdir()


def empty(root: Path) -> None:
    """Remove everything in a folder and keep the folder itself: it may be mounted elsewhere.

    Its mode becomes 0700, as a guest of our own user may have closed it.
    """
    root.chmod(0o700)
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _empty_top(top)
    finally:
        os.close(top)


def wipe_entry(name: str, folder: int) -> None:
    """Remove what has this name in an open folder, a file or a tree."""
    try:
        os.unlink(name, dir_fd=folder)
        return
    except (IsADirectoryError, PermissionError):  # Linux says the one, others may say the other
        top = open_folder(name, folder)
    try:
        _empty_top(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=folder)


def _empty_top(top: int) -> None:
    # A guest must not have taken the names that its folders get: they cannot be foretold.
    prefix = f".wipe-{secrets.token_hex(8)}-"
    waiting = _empty_one(top, top, prefix, 0)
    moved = len(waiting)
    while waiting:
        name = waiting.pop()
        inner = open_folder(name, top)
        try:
            os.fchmod(inner, 0o700)
            more = _empty_one(inner, top, prefix, moved)
        finally:
            os.close(inner)
        moved += len(more)
        waiting += more
        os.rmdir(name, dir_fd=top)


def _empty_one(folder: int, top: int, prefix: str, moved: int) -> list[str]:
    """Unlink the files of a folder and move its folders to the top under names of ours."""
    with os.scandir(folder) as names:
        items = [(item.name, item.is_dir(follow_symlinks=False)) for item in names]
    folders: list[str] = []
    for name, is_folder in items:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
            continue
        with contextlib.suppress(PermissionError):  # a folder of another user is left to its error
            os.chmod(f"/proc/self/fd/{folder}/{name}", 0o700)
        ours = f"{prefix}{moved + len(folders)}"
        os.rename(name, ours, src_dir_fd=folder, dst_dir_fd=top)
        folders.append(ours)
    return folders
