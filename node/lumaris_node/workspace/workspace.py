"""A lease's workspace in its volume: what one buyer sent, what its jobs see, what they made.

`blobs/` holds the buyer's files by hash, `logs/` what the jobs printed, `in/` and `out/` are what
every job of the lease sees under these same paths, `kept/<job>/` are delivered outputs until the
buyer's word on them. Only the node may enter the folder above; that is what guards `out/`, which
the guest's own user must be able to write.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

from lumaris_node.workspace.collect import OutputFile, collect_outputs
from lumaris_node.workspace.tree import BLOCK_BYTES, disk_use
from lumaris_node.workspace.volume import Volume
from lumaris_node.workspace.wipe import empty, wipe, wipe_entry
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN
from lumaris_protocol.paths import safe_parts

__all__ = ["LeaseWorkspace", "volume_bounds", "wipe", "wipe_entry"]

# Delivered outputs of a lease that may wait for the buyer, and kept inputs: each costs an inode.
KEPT_FILES_MAX = 8 * limits.OUTPUT_FILES_MAX
BLOB_FILES_MAX = 8 * limits.INPUT_FILES_MAX
# Folders of inputs and outputs, and ours.
_FOLDERS = 4 * limits.INPUT_FILES_MAX


def volume_bounds(disk_bytes: int) -> tuple[int, int]:
    """Bytes and files of the volume of a lease whose jobs may use so much disk each.

    Inputs have their allowance beside it, and a module passes through on its way to its store.
    """
    size = disk_bytes + limits.INPUT_ALLOWANCE_BYTES + limits.MODULE_BYTES_MAX
    return size, limits.SCRATCH_FILES_MAX + KEPT_FILES_MAX + BLOB_FILES_MAX + _FOLDERS


class LeaseWorkspace:
    """The folders of one lease, in an open volume. One job at a time; all methods block."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.blobs = volume.path / "blobs"
        self.logs = volume.path / "logs"
        self.inputs = volume.path / "in"
        self.outputs = volume.path / "out"
        self._kept = volume.path / "kept"
        self.ready = False  # `in/` and `out/` are empty, and nothing came or went since `mark`
        self._staged = self._staged_bytes = 0
        self._before = (0, 0)  # what the volume held when the job began
        self._counting = threading.Lock()  # outputs are forgotten while another job begins

    def open(self) -> None:
        """Open the volume and make the folders. Raises LumarisError `volume_failed`."""
        self._volume.open()
        try:
            for folder in (self.blobs, self.inputs, self.outputs, self._kept, self.logs):
                folder.mkdir(mode=0o700)
            self._open_to_guest()
        except OSError as error:
            self._volume.close()
            raise LumarisError("volume_failed", f"No workspace: {error}.") from error

    def close(self) -> None:
        """Remove everything. Idempotent."""
        self._volume.close()

    # --- one job ---

    def begin(self) -> None:
        """Make `in/` and `out/` empty for a job; blocks unless they are `ready`.

        Raises LumarisError `platform_error`.
        """
        self._staged = self._staged_bytes = 0
        try:
            if not self.ready:
                self.clear()
        except OSError as error:
            raise LumarisError("platform_error", f"No workspace: {error.strerror}.") from error
        self.ready = False

    def clear(self) -> None:
        """Remove what is in `in/` and `out/`, for the next job. Raises OSError."""
        for folder in (self.inputs, self.outputs):
            empty(folder)
        self._open_to_guest()
        self.ready = True  # before it is counted: a file that goes meanwhile takes it back
        self.mark()

    def touched(self) -> None:
        """A file of `blobs/` came or went: what the next job finds is counted again."""
        self.ready = False

    def _open_to_guest(self) -> None:
        self.inputs.chmod(0o755)
        self.outputs.chmod(0o777)

    def stage(self, path: str, source: Path, size_bytes: int) -> None:
        """Show a checked file of `blobs/` in `in/`, without a copy: guests cannot write there.

        Raises LumarisError `bad_input` or `platform_error`.
        """
        parts = safe_parts(path)
        self._staged += 1
        self._staged_bytes += size_bytes
        if self._staged > limits.INPUT_FILES_MAX or self._staged_bytes > limits.INPUT_BYTES_MAX:
            raise LumarisError("bad_input", "The inputs are too many or too large.")
        folder = self.inputs
        try:
            for part in parts[:-1]:
                folder /= part
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    folder.chmod(0o755)
            source.chmod(0o444)
            os.link(source, folder / parts[-1], follow_symlinks=False)
        except (FileExistsError, NotADirectoryError) as error:
            raise LumarisError("bad_input", f"The input {path[:80]!r} comes twice.") from error
        except OSError as error:
            raise LumarisError("platform_error", f"Staging failed: {error.strerror}.") from error

    def mark(self) -> None:
        """From here on what the volume gains is the job's. Raises OSError."""
        with self._counting:
            used, logs = self._volume.used(), disk_use(self.logs)
            self._before = used[0] - logs[0], used[1] - logs[1]

    def disk_use(self) -> tuple[int, int]:
        """Bytes and files that the job has written since `mark`. Raises OSError."""
        used, before = self._volume.used(), self._before
        # What it prints is bounded by itself, and written by us.
        logs = disk_use(self.logs)
        return max(0, used[0] - before[0] - logs[0]), max(0, used[1] - before[1] - logs[1])

    def collect(self, *, files_max: int, bytes_max: int) -> tuple[OutputFile, ...]:
        """The checked contents of `out/`. Raises LumarisError `killed_output`."""
        return collect_outputs(self.outputs, files_max=files_max, bytes_max=bytes_max)

    # --- delivered outputs ---

    def keep(self, job: str) -> bool:
        """Move what is in `out/` to where it waits for the buyer; whether there was anything.

        Raises OSError.
        """
        target = self.kept(job)
        with os.scandir(self.outputs) as names:
            items = [item.name for item in names]
        if items:
            target.mkdir(mode=0o700)
        for name in items:
            os.rename(self.outputs / name, target / name)
        return bool(items)

    def kept(self, job: str) -> Path:
        """Where the outputs of a delivered job are. Raises ValueError for a name that is no id."""
        if not re.fullmatch(ID_PATTERN, job):
            raise ValueError(f"not an id: {job[:40]!r}")
        return self._kept / job

    def forget(self, job: str) -> None:
        """Remove the outputs of a delivered job. Idempotent; raises OSError."""
        folder = self.kept(job)
        if not folder.is_dir():
            return
        with self._counting:
            size, count = disk_use(folder)
            size += folder.stat().st_blocks * BLOCK_BYTES
            wipe(folder)
            # Another job may run: what it has written must not seem less than it is.
            bytes_before, files_before = self._before
            self._before = max(0, bytes_before - size), max(0, files_before - count - 1)
