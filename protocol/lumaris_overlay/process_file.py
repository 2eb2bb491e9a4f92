"""What an overlay process says of itself on disk; while it lives, it holds a lock on that file.

The lock is the kernel's (`flock`), so it goes with the process however that ends. Whoever finds
the file unlocked knows that nobody is there and that what it says is old.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import trio

from lumaris_protocol.errors import LumarisError

NAME: Final = "process.json"
# A process whose owner was killed takes up to five seconds to leave, and a client that only looks
# holds the file for an instant.
_PATIENCE_S = 6.0
_POLL_S = 0.02
_BYTES_MAX = 4_096


class ProcessFacts(msgspec.Struct, frozen=True):
    """One overlay process. `started_ticks` tells it from a later process with the same pid."""

    pid: int
    started_ticks: int
    started_at: int
    network: str
    linger_s: float | None
    memory_bytes_max: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_ticks(self.pid) == self.started_ticks != 0


@asynccontextmanager
async def held(folder: Path, facts: ProcessFacts) -> AsyncGenerator[None]:
    """Be the one process of a state folder. Raises LumarisError `already_running`."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}") from None
    try:
        with trio.move_on_after(_PATIENCE_S) as patience:
            while not _take(descriptor, fcntl.LOCK_EX):  # noqa: ASYNC110 - held elsewhere
                await trio.sleep(_POLL_S)
        if patience.cancelled_caught:
            raise LumarisError("already_running", f"An overlay process already uses {folder}.")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, msgspec.json.encode(facts))
        yield
    finally:
        os.close(descriptor)


def holder(folder: Path) -> ProcessFacts | None:
    """The overlay process that uses a state folder now, if any."""
    text = _held_text(folder)
    try:
        facts = msgspec.json.decode(text, type=ProcessFacts) if text else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    # Between its lock and its first word, a new process's file still speaks of the last one.
    return facts if facts is not None and facts.alive else None


def is_held(folder: Path) -> bool:
    """Whether a process still has the folder; it may have ended but for its last threads."""
    return _held_text(folder) is not None


def _held_text(folder: Path) -> bytes | None:
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _take(descriptor, fcntl.LOCK_SH) else os.read(descriptor, _BYTES_MAX)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def resident_bytes(pid: int) -> int:
    """The memory that a process holds; 0 when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
