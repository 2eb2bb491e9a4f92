"""Naming a process so that a later one with the same pid is not taken for it."""

from __future__ import annotations

import os
from pathlib import Path


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def this_process() -> str:
    """This process's name, as kept in the store."""
    return f"{os.getpid()}:{start_time(os.getpid())}"


def alive(name: str) -> bool:
    """Whether the process of that name still runs."""
    pid, _, started = name.partition(":")
    return pid.isdigit() and started != "0" and str(start_time(int(pid))) == started


def naming(text: str) -> list[str]:
    """Command lines of the living processes, but for this one, that name a text such as a path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if text in command and int(entry.name) != os.getpid() and start_time(int(entry.name)):
            found.append(command.strip())
    return found
