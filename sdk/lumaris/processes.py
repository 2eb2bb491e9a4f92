"""Naming a process so that a later one with the same pid is not taken for it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lumaris_overlay.process_file import start_ticks


def this_process() -> str:
    """This process's name, as kept in the store."""
    return _name(os.getpid())


@cache
def _name(pid: int) -> str:
    return f"{pid}:{start_ticks(pid)}"


def alive(name: str) -> bool:
    """Whether the process of that name still runs."""
    pid, _, started = name.partition(":")
    return pid.isdigit() and started != "0" and str(start_ticks(int(pid))) == started


def naming(text: str) -> list[str]:
    """Command lines of the living processes, but for this one, that name a text such as a path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if text in command and int(entry.name) != os.getpid() and start_ticks(int(entry.name)):
            found.append(command.strip())
    return found
