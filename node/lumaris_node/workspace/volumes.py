"""The volumes of a node: which kind this machine really can make, one for each lease, reaping."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from lumaris_node.workspace.disk_image import FscryptVolume
from lumaris_node.workspace.gocryptfs import GocryptfsVolume
from lumaris_node.workspace.memory import (
    SHARED_MEMORY,
    MemoryVolume,
    PlainVolume,
    TmpfsVolume,
)
from lumaris_node.workspace.mounts import mounts_below, unmount
from lumaris_node.workspace.volume import Volume, remove
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN
from lumaris_protocol.limits import MIB

log = logging.getLogger(__name__)

Encryption = Literal["auto", "fscrypt", "gocryptfs", "tmpfs", "memory", "off"]

_HINT: Final = (
    "Run the node as root on Linux, or without swap, or allow unencrypted files in its folder: "
    'encryption = "off" under [share] in node.toml.'
)
_TRIAL: Final = "trial"
_NAME: Final = re.compile(rf"{ID_PATTERN}|^{_TRIAL}\Z")
_KINDS: Final[Mapping[str, type[Volume]]] = MappingProxyType(
    {
        "fscrypt": FscryptVolume,
        "gocryptfs": GocryptfsVolume,
        "tmpfs": TmpfsVolume,
        "memory": MemoryVolume,
        "off": PlainVolume,
    }
)
# fscrypt first, although gocryptfs writes large files three times as fast on a kernel without
# AES instructions: it makes and reads small files thirty times as fast, and needs no process.
_AUTO: Final = ("fscrypt", "gocryptfs", "tmpfs", "memory")


class Volumes:
    """Makes the volumes of one node, all of one kind, below `directory`."""

    def __init__(self, directory: Path, kind: type[Volume]) -> None:
        self.directory = directory
        self._kind = kind

    @classmethod
    def open(cls, directory: Path, *, encryption: Encryption = "auto") -> Volumes:
        """Find a kind that works here by really using it. Blocks for some 20 ms.

        What a killed predecessor left is removed first. `off` means plain folders. Raises
        LumarisError `volume_failed` when nothing works.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        left = reap(directory)
        if left:
            log.warning("reaped volumes count=%d", left)
        failures: list[str] = []
        for name in _AUTO if encryption == "auto" else (encryption,):
            volumes = cls(directory, _KINDS[name])
            try:
                volumes._try_out()
            except (LumarisError, OSError) as error:
                failures.append(str(error))
            else:
                log.info("volumes kind=%s", volumes.kind)
                return volumes
        raise LumarisError("volume_failed", " ".join(failures), hint=_HINT)

    @property
    def kind(self) -> str:
        """What its volumes are: fscrypt, gocryptfs, tmpfs, memory or plain."""
        return self._kind.kind

    @property
    def memory_backed(self) -> bool:
        """Whether what lies in its volumes takes memory and not disk."""
        return self._kind.memory_backed

    def volume(self, lease: str, *, bytes_max: int, files_max: int) -> Volume:
        """A lease's volume, still to be opened. Raises ValueError for a name that is no id."""
        if not _NAME.match(lease):
            raise ValueError(f"not an id: {lease[:40]!r}")
        folder = self.directory / lease
        if self._kind is MemoryVolume:
            folder = SHARED_MEMORY / f"{_mark(self.directory)}{lease}"
        return self._kind(folder, bytes_max=bytes_max, files_max=files_max)

    def _try_out(self) -> None:
        volume = self.volume(_TRIAL, bytes_max=MIB, files_max=64)
        volume.open()
        try:
            file = volume.path / "trial"
            file.write_bytes(_TRIAL.encode())
            if file.read_bytes() != _TRIAL.encode() or volume.used()[1] < 1:
                raise OSError(f"A {self.kind} volume does not hold what is written to it.")
        finally:
            volume.close()


def reap(directory: Path) -> int:
    """Unmount and remove every volume below `directory`; how many there were. Idempotent.

    What resists is logged. Nothing may be using the directory.
    """
    for target in mounts_below(directory):
        try:
            unmount(target)
        except OSError as error:
            log.warning("not unmounted path=%s error=%r", target, error)
    mark = _mark(directory)
    left = [entry for entry in _entries(directory) if _NAME.match(entry.name)]
    left += [entry for entry in _entries(SHARED_MEMORY) if _is_ours(entry, mark)]
    for entry in left:
        try:
            remove(entry)
        except OSError as error:
            log.warning("volume not removed path=%s error=%r", entry, error)
    return len(left)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_ours(entry: Path, mark: str) -> bool:
    return entry.name.startswith(mark) and entry.lstat().st_uid == os.geteuid()


def _mark(directory: Path) -> str:
    """What names in shared memory begin with: this folder's own, of all nodes of the machine."""
    name = os.fsencode(os.path.realpath(directory))
    return f"lumaris-{hashlib.sha256(name).hexdigest()[:12]}-"
