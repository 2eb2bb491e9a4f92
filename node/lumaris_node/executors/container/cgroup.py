"""What the kernel says of a container: the files of its control group, version 1 or 2.

The group is found through /proc of a process in it, so the engine's cgroup driver and parent do
not matter. It is not found when the engine runs on another machine, or in a virtual one.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from lumaris_node.sandbox.cgroups import (
    V1_CONTROLLERS,
    Group,
    GroupV1,
    GroupV2,
    limit_sockets,
)

_ROOT = Path("/sys/fs/cgroup")
_NANOS, _MICROS = 1_000_000, 1_000  # in a millisecond
# Killed processes are gone within milliseconds.
_QUIET_TRIES, _QUIET_POLL_S = 20, 0.001


@dataclass(frozen=True)
class Facts:
    """Totals since the group was made; the peak since it was last reset."""

    cpu_ms: int = 0
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    oom_kills: int = 0
    pids_hits: int = 0


@dataclass(frozen=True)
class ContainerGroup:
    """The folders of one container's group; all the same on version 2.

    `control` freezes it and kills in it; None where the engine gave it no such group.
    """

    cpu: Path
    memory: Path
    pids: Path
    unified: bool
    control: Group | None = None

    @classmethod
    def of(cls, pid: int, container: str) -> ContainerGroup | None:
        """The group of a process of this machine, if its path names the container. Blocks."""
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return None
        paths: dict[str, Path] = {}
        for line in lines:
            _, names, path = line.split(":", 2)
            if container in path:
                for name in names.split(","):
                    folder = _ROOT / (names if names else "")
                    paths[name] = folder / path.lstrip("/")
        if {"memory", "pids", "cpuacct"} <= paths.keys():
            control = None
            if set(V1_CONTROLLERS) <= paths.keys():
                control = GroupV1(container, tuple(paths[name] for name in V1_CONTROLLERS))
            found = cls(
                paths["cpuacct"], paths["memory"], paths["pids"], unified=False, control=control
            )
        elif "" in paths:
            whole = GroupV2(container, (paths[""],))
            found = cls(paths[""], paths[""], paths[""], unified=True, control=whole)
        else:
            return None
        return found if pid in found.processes() else None

    def processes(self) -> list[int]:
        """The processes in the group; none when it is gone."""
        try:
            text = (self.pids / "cgroup.procs").read_text(encoding="ascii")
        except OSError:
            return []
        return [int(line) for line in text.split()]

    def quiet(self, spare: int) -> bool:
        """Whether it soon holds no process but `spare`. Blocks for some milliseconds."""
        for _ in range(_QUIET_TRIES):
            if all(pid == spare for pid in self.processes()):
                return True
            time.sleep(_QUIET_POLL_S)
        return False

    def kill(self, *, spare: int = 0) -> bool:
        """Kill all in it but `spare`, whatever they did to hinder it; False when some live on.

        Blocks for seconds at most. Nothing in the group has to run for this.
        """
        if self.control is None:
            return self.quiet(spare)
        return self.control.kill(spare=spare)

    def limit_sockets(self, memory_bytes: int) -> None:
        """Bound what the memory limit does not count. Raises OSError. Blocks."""
        if not self.unified:
            limit_sockets(self.memory, memory_bytes)

    def facts(self) -> Facts:
        """Read in well under a millisecond; 0 for a file that is not there."""
        if self.unified:
            return Facts(
                _number(self.cpu / "cpu.stat", "usage_usec ") // _MICROS,
                _number(self.memory / "memory.current"),
                _number(self.memory / "memory.peak"),
                _number(self.memory / "memory.events", "oom_kill "),
                _number(self.pids / "pids.events", "max "),
            )
        return Facts(
            _number(self.cpu / "cpuacct.usage") // _NANOS,
            _number(self.memory / "memory.usage_in_bytes"),
            _number(self.memory / "memory.max_usage_in_bytes"),
            _number(self.memory / "memory.oom_control", "oom_kill "),
            _number(self.pids / "pids.events", "max "),
        )

    def reset_peak(self) -> bool:
        """Begin a new peak; False where the kernel has none to reset (version 2, or no root)."""
        if not self.unified:
            with contextlib.suppress(OSError):
                (self.memory / "memory.max_usage_in_bytes").write_text("0", encoding="ascii")
                return True
        return False


def _number(path: Path, key: str = "") -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.removeprefix(key))
    except (OSError, ValueError):
        return 0
    return 0
