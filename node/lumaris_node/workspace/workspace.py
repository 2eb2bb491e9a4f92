"""One job's folder: `in/` for verified inputs, `out/` for the guest, gone without a trace after.

The base and the job's folder are open to this user only; that is what guards `out/`, which the
guest's own user must be able to write. Encryption at rest is not part of this version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from lumaris_node.workspace.collect import OutputFile, collect_outputs
from lumaris_node.workspace.tree import open_folder
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN
from lumaris_protocol.paths import safe_parts

CHUNK_BYTES = 1024 * 1024
WIPE_PREFIX = ".wipe-"  # not a name that a job's folder starts with


class Workspace:
    """The folders of one job. All methods block; call them from a thread when files are large."""

    def __init__(self, base: Path, job: str) -> None:
        """Create the folders. Raises ValueError for a name that is not an id of ours."""
        if not re.fullmatch(ID_PATTERN, job):
            raise ValueError(f"not an id: {job[:40]!r}")
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        base.chmod(0o700)
        self.root = base / job
        self.inputs = self.root / "in"
        self.outputs = self.root / "out"
        self._files = 0
        self._bytes = 0
        try:
            self.root.mkdir(mode=0o700)
            self.inputs.mkdir()
            self.inputs.chmod(0o755)
            self.outputs.mkdir()
            self.outputs.chmod(0o777)
        except OSError as error:
            raise LumarisError("platform_error", f"No workspace: {error.strerror}.") from error

    def stage_file(self, path: str, source: Path, digest: str) -> None:
        """Copy a file into /in and check it on the way. Raises LumarisError `bad_input`."""
        with source.open("rb") as reader:
            self.stage_chunks(path, iter(lambda: reader.read(CHUNK_BYTES), b""), digest)

    def stage_chunks(self, path: str, chunks: Iterable[bytes], digest: str) -> None:
        """Write a file into /in and check its digest. Raises LumarisError `bad_input`."""
        target = self.inputs.joinpath(*safe_parts(path))
        self._files += 1
        if self._files > limits.INPUT_FILES_MAX:
            raise LumarisError("bad_input", f"More than {limits.INPUT_FILES_MAX} input files.")
        seen = hashlib.sha256()
        try:
            for folder in reversed(target.relative_to(self.inputs).parents[:-1]):
                (self.inputs / folder).mkdir(mode=0o755, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(target, flags, 0o644), "wb") as writer:
                for chunk in chunks:
                    self._bytes += len(chunk)
                    if self._bytes > limits.INPUT_BYTES_MAX:
                        raise LumarisError("bad_input", "The inputs are too large.")
                    seen.update(chunk)
                    writer.write(chunk)
        except (FileExistsError, NotADirectoryError) as error:
            raise LumarisError("bad_input", f"The input {path[:80]!r} comes twice.") from error
        except OSError as error:
            raise LumarisError("platform_error", f"Staging failed: {error.strerror}.") from error
        if f"sha256:{seen.hexdigest()}" != digest:
            target.unlink()
            raise LumarisError("bad_input", f"The input {path[:80]!r} does not match its digest.")

    def collect(self, *, files_max: int, bytes_max: int) -> tuple[OutputFile, ...]:
        """The checked contents of /out. Raises LumarisError `killed_output`."""
        return collect_outputs(self.outputs, files_max=files_max, bytes_max=bytes_max)

    def destroy(self) -> None:
        """Remove everything, whatever modes and names the guest gave it. Idempotent."""
        wipe(self.root)


def wipe(root: Path) -> None:
    """Remove a tree of ours that a stranger filled; links in it are removed, never followed.

    Folders are moved to the top before they are emptied, so that depth costs neither descriptors
    nor stack: a guest may nest thousands.
    """
    with contextlib.suppress(FileNotFoundError):
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            waiting = _empty(top, top, 0)
            moved = len(waiting)
            while waiting:
                name = waiting.pop()
                inner = open_folder(name, top)
                try:
                    more = _empty(inner, top, moved)
                finally:
                    os.close(inner)
                moved += len(more)
                waiting += more
                os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        root.rmdir()


def _empty(folder: int, top: int, moved: int) -> list[str]:
    """Unlink the files of a folder and move its folders to the top under names of ours."""
    os.fchmod(folder, 0o700)
    with os.scandir(folder) as names:
        items = [(item.name, item.is_dir(follow_symlinks=False)) for item in names]
    folders: list[str] = []
    for name, is_folder in items:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
            continue
        with contextlib.suppress(PermissionError):  # a folder of another user is left to its error
            os.chmod(f"/proc/self/fd/{folder}/{name}", 0o700)
        ours = f"{WIPE_PREFIX}{moved + len(folders)}"
        os.rename(name, ours, src_dir_fd=folder, dst_dir_fd=top)
        folders.append(ours)
    return folders


def reap(base: Path) -> int:
    """Remove the workspaces that a killed predecessor left below `base`; how many there were."""
    if not base.is_dir():
        return 0
    left = [entry for entry in base.iterdir() if re.fullmatch(ID_PATTERN, entry.name)]
    for entry in left:
        wipe(entry)
    return len(left)
