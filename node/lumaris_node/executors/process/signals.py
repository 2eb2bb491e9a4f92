"""What is asked of the kernel about a sandbox's processes, and the one signal they are sent."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

from lumaris_node.sandbox.cgroups import Group


def users_of(pid: int) -> set[int]:
    """Every user id the kernel has for a process: real, effective, saved, of the file system.

    Raises OSError for a process that is gone.
    """
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^Uid:((?:\s+\d+){4})$", text, re.MULTILINE)
    return {int(word) for word in found[1].split()} if found else set()


def ask_to_end(group: Group, first: int) -> bool:
    """Send SIGTERM to the command in a sandbox whose process 1 is `first`; False if it is gone.

    Process 1 ignores it and orphans are its children too: the command is the eldest child.
    """
    children = []
    for pid in group.pids():
        with contextlib.suppress(OSError):
            parent, born = _parent_and_birth(pid)
            if parent == first:
                children.append((born, pid))
    for born, pid in sorted(children):
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                # The number may have gone to another process since; the descriptor holds it now.
                if _parent_and_birth(pid) == (first, born):
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                    return True
            finally:
                os.close(descriptor)
    return False


def _parent_and_birth(pid: int) -> tuple[int, int]:
    """The parent's pid, and the start in clock ticks since boot. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    return int(fields[1]), int(fields[19])
