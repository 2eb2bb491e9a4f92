"""What both sides of a session signed, kept as files: the evidence of a dispute.

Each session has a file of length-prefixed envelopes in the order in which they were said or heard.
Logs and meters are not kept: they prove nothing that a delivery does not. Writing lags behind by
a second at most, and a session that says very much keeps the newest part.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trio

from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol import envelope
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN
from lumaris_protocol.limits import ENVELOPE_BYTES_MAX, MIB

log = logging.getLogger(__name__)

_KEPT: Final = frozenset(
    ("work_order", "job_event", "delivery", "acceptance", "voucher", "cancel", "close")
)
# Some 10,000 orders; twice that on disk, since the older half goes as a whole.
_FILE_BYTES_MAX: Final = 16 * MIB
# Every session of a busy month, or of longer for most.
_FOLDER_BYTES_MAX: Final = 512 * MIB
_PREFIX_BYTES: Final = 4
# An order with the largest input list and its chain: what one envelope of a session may be.
_ENVELOPE_BYTES_MAX: Final = 4 * ENVELOPE_BYTES_MAX
_OLD: Final = ".old"


class EvidenceLog:
    """The file of one session. `note` never blocks; `flush` writes what was noted."""

    def __init__(self, folder: Path, session: str) -> None:
        self._path = _path(folder, session)
        self._pending = bytearray()
        self._writing = trio.Lock()

    def note(self, data: bytes) -> None:
        """Keep an envelope, if it is of a kind that proves something."""
        if envelope.type_of(data) in _KEPT and len(self._pending) < _FILE_BYTES_MAX:
            self._pending += len(data).to_bytes(_PREFIX_BYTES, "big") + data

    async def close(self) -> None:
        """Write the rest, and make room when all sessions together keep too much."""
        await self.flush()
        try:
            await trio.to_thread.run_sync(prune_evidence, self._path.parent)
        except OSError as error:
            log.warning("old evidence not removed error=%s", error)

    async def flush(self) -> None:
        """Write what was noted. A full disk loses evidence, not money."""
        if not self._pending:
            return
        async with self._writing:
            data, self._pending = bytes(self._pending), bytearray()
            try:
                await trio.to_thread.run_sync(_append, self._path, data)
            except (OSError, LumarisError) as error:
                log.warning("evidence not kept file=%s error=%s", self._path.name, error)


def read_evidence(folder: Path, session: str) -> list[bytes]:
    """Every envelope kept of a session, oldest first; none when nothing was kept.

    A record that a crash cut short ends the list. Raises OSError.
    """
    path = _path(folder, session)
    found: list[bytes] = []
    for part in (path.with_suffix(_OLD), path):
        try:
            data = part.read_bytes()
        except FileNotFoundError:
            continue
        found.extend(_split(data))
    return found


def prune_evidence(folder: Path, *, bytes_max: int = _FOLDER_BYTES_MAX) -> int:
    """Remove the files written to longest ago until the rest fits; how many. Raises OSError."""
    files = sorted(
        ((file.stat(), file) for file in _files(folder)), key=lambda one: -one[0].st_mtime
    )
    total = removed = 0
    for facts, file in files:
        total += facts.st_size
        if total > bytes_max:
            file.unlink(missing_ok=True)
            removed += 1
    return removed


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("ses_*") if file.is_file())


def _path(folder: Path, session: str) -> Path:
    if re.match(ID_PATTERN, session) is None:
        raise ValueError("not a session id")
    return folder / f"{session}.evidence"


def _append(path: Path, data: bytes) -> None:
    make_private_folder(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        with os.fdopen(descriptor, "ab", closefd=False) as file:
            file.write(data)
    finally:
        os.close(descriptor)
    if size + len(data) > _FILE_BYTES_MAX:
        path.replace(path.with_suffix(_OLD))


def _split(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + _PREFIX_BYTES <= len(data):
        size = int.from_bytes(data[at : at + _PREFIX_BYTES], "big")
        at += _PREFIX_BYTES
        if not 0 < size <= _ENVELOPE_BYTES_MAX or at + size > len(data):
            return
        yield data[at : at + size]
        at += size
