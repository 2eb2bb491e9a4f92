"""Control groups, version 1 and 2: a bounded group of processes, its facts, and its end.

Everything here is a read or write of small kernel files; `kill` and `remove` may block for up to a
second and belong in a thread. Only the standard library is used: the launcher imports this too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
PERIOD_US = 100_000
# The kernel refuses quotas below a millisecond.
QUOTA_US_MIN = 1000
# A killed group of thousands is reaped by the kernel in well under a second.
TRIES = 400
TRY_S = 0.005
# Thousands of tasks freeze in some milliseconds; one that the disk keeps is not waited for.
FREEZE_TRIES = 10
V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer")
V2_CONTROLLERS = ("cpu", "memory", "pids")


def mark_of(node: str) -> str:
    """What the names of this node's control groups begin with."""
    return f"lumaris-{node[:12]}-"


class CgroupsUnavailableError(Exception):
    """This machine offers no control groups that we can use; the text says why."""


@dataclass(frozen=True)
class Facts:
    """What the kernel says of a group, over its whole life."""

    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    oom_kills: int = 0
    pids_refused: int = 0


class Group:
    """One group: a folder in each hierarchy that it has."""

    def __init__(self, name: str, folders: tuple[Path, ...]) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"not a group's name: {name[:40]!r}")
        self.name = name
        self.folders = folders

    @property
    def joins(self) -> tuple[Path, ...]:
        """Files that a process of one thread writes "0" to in order to enter the group."""
        return self._members

    @property
    def _members(self) -> tuple[Path, ...]:
        return tuple(folder / "cgroup.procs" for folder in self.folders)

    def add(self, pid: int) -> None:
        """Move a process in. Raises OSError."""
        for path in self._members:
            _write(path, str(pid))

    def pids(self) -> tuple[int, ...]:
        """Processes in it now, in any of its hierarchies."""
        found: set[int] = set()
        for path in self._members:
            with contextlib.suppress(OSError):
                found.update(int(word) for word in path.read_text().split())
        return tuple(sorted(found))

    def remove(self) -> bool:
        """Kill who is in it and remove it; False when it is still there after seconds of trying."""
        self.kill()
        for folder in self.folders:
            for _ in range(TRIES):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # a member died a moment ago and is still counted, or came late
                    self._kill_once(0)
                    time.sleep(TRY_S)
            else:
                return False
        return True

    def kill(self, *, spare: int = 0) -> bool:
        """Kill every member, frozen or not, but `spare`; False when some live after seconds of it.

        The limit on processor time is lifted meanwhile: what is throttled neither freezes nor dies.
        """
        if self._only(spare):
            return True
        quota = self._lift_quota()
        try:
            for _ in range(TRIES):
                self._kill_once(spare)
                if self._only(spare):
                    return True
                time.sleep(TRY_S)
            return self._only(spare)
        finally:
            if spare:
                self._restore_quota(quota)

    def facts(self) -> Facts:
        """What it used and which limits it met; zeros once it is gone."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop every member. Raises OSError."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Let them go on. Raises OSError."""
        raise NotImplementedError

    def _limit(self, *, memory_bytes: int, cpu_millis: int, pids: int) -> None:
        raise NotImplementedError

    def quota_file(self) -> tuple[Path, str]:
        """Where the limit on processor time stands, and the word for none."""
        raise NotImplementedError

    def _frozen(self) -> bool:
        raise NotImplementedError

    def _only(self, spare: int) -> bool:
        return all(pid == spare for pid in self.pids())

    def _lift_quota(self) -> str:
        path, unlimited = self.quota_file()
        try:
            found = path.read_text().strip()
            _write(path, unlimited)
        except OSError:
            return ""
        return found

    def _restore_quota(self, quota: str) -> None:
        if quota:
            with contextlib.suppress(OSError):
                _write(self.quota_file()[0], quota)

    def _kill_once(self, spare: int) -> None:
        """Freeze, so that nobody forks away between the list and the signals."""
        with contextlib.suppress(OSError):
            self.freeze()
            for _ in range(FREEZE_TRIES):
                if self._frozen():
                    break
                time.sleep(TRY_S)
        for pid in self.pids():
            # 0 is a process outside our pid namespace, -1 would be everybody
            if pid > 1 and pid != spare:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.thaw()


class GroupV1(Group):
    """A group in the hierarchies of version 1, in the order of V1_CONTROLLERS."""

    @property
    def joins(self) -> tuple[Path, ...]:
        """The lists of threads: for a whole process the kernel stops every fork of the machine,
        and waits some 10 ms for that."""
        return tuple(folder / "tasks" for folder in self.folders)

    def facts(self) -> Facts:
        memory, pids, _, cpu, _ = self._five()
        return Facts(
            cpu_ms=_number(cpu / "cpuacct.usage") // 1_000_000,
            memory_peak_bytes=_number(memory / "memory.max_usage_in_bytes"),
            oom_kills=_keyed(memory / "memory.oom_control").get("oom_kill", 0),
            pids_refused=_keyed(pids / "pids.events").get("max", 0),
        )

    def freeze(self) -> None:
        _write(self._five()[4] / "freezer.state", "FROZEN")

    def thaw(self) -> None:
        _write(self._five()[4] / "freezer.state", "THAWED")

    def _frozen(self) -> bool:
        return (self._five()[4] / "freezer.state").read_text().strip() == "FROZEN"

    def quota_file(self) -> tuple[Path, str]:
        return self._five()[2] / "cpu.cfs_quota_us", "-1"

    def _five(self) -> tuple[Path, Path, Path, Path, Path]:
        memory, pids, cpu, cpuacct, freezer = self.folders
        return memory, pids, cpu, cpuacct, freezer

    def _limit(self, *, memory_bytes: int, cpu_millis: int, pids: int) -> None:
        memory, processes, cpu, _, _ = self._five()
        _write(memory / "memory.limit_in_bytes", str(memory_bytes))
        swap = memory / "memory.memsw.limit_in_bytes"  # memory and swap together; absent without
        if swap.exists():
            _write(swap, str(memory_bytes))
        limit_sockets(memory, memory_bytes)
        _write(cpu / "cpu.cfs_period_us", str(PERIOD_US))
        _write(cpu / "cpu.cfs_quota_us", str(_quota_us(cpu_millis)))
        _write(processes / "pids.max", str(pids))


class GroupV2(Group):
    """A group of the unified hierarchy: one folder."""

    def facts(self) -> Facts:
        folder = self.folders[0]
        return Facts(
            cpu_ms=_keyed(folder / "cpu.stat").get("usage_usec", 0) // 1000,
            # memory.peak came with Linux 5.19; before it the present use is the best there is.
            memory_peak_bytes=_number(folder / "memory.peak") or _number(folder / "memory.current"),
            oom_kills=_keyed(folder / "memory.events").get("oom_kill", 0),
            pids_refused=_keyed(folder / "pids.events").get("max", 0),
        )

    def freeze(self) -> None:
        _write(self.folders[0] / "cgroup.freeze", "1")

    def thaw(self) -> None:
        _write(self.folders[0] / "cgroup.freeze", "0")

    def _frozen(self) -> bool:
        return _keyed(self.folders[0] / "cgroup.events").get("frozen", 1) == 1

    def quota_file(self) -> tuple[Path, str]:
        return self.folders[0] / "cpu.max", "max"

    def _limit(self, *, memory_bytes: int, cpu_millis: int, pids: int) -> None:
        folder = self.folders[0]
        _write(folder / "memory.max", str(memory_bytes))
        swap = folder / "memory.swap.max"  # absent where the kernel has no swap
        if swap.exists():
            _write(swap, "0")
        _write(folder / "memory.oom.group", "1")
        _write(folder / "cpu.max", f"{_quota_us(cpu_millis)} {PERIOD_US}")
        _write(folder / "pids.max", str(pids))

    def _kill_once(self, spare: int) -> None:
        kill = self.folders[0] / "cgroup.kill"  # since Linux 5.14
        if spare or not kill.exists():
            super()._kill_once(spare)
            return
        with contextlib.suppress(OSError):
            _write(kill, "1")


class Cgroups:
    """The control groups of this machine, below `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        """Raises CgroupsUnavailableError with the reason."""
        self.root = root
        self.version = _version(root)
        if self.version == 1:
            self._bases = tuple(root / controller for controller in V1_CONTROLLERS)
        else:
            self._bases = (root,)
            _delegate(root)

    def create(self, name: str, *, memory_bytes: int, cpu_millis: int, pids: int) -> Group:
        """A new group with these limits and no swap. Raises OSError; then nothing is left of it."""
        group = self.group(name)
        if group.pids():
            raise FileExistsError(f"the control group {name} is in use")
        try:
            for folder in group.folders:
                with contextlib.suppress(FileExistsError):  # cpu and cpuacct may be one hierarchy
                    folder.mkdir(mode=0o755)
            group._limit(memory_bytes=memory_bytes, cpu_millis=cpu_millis, pids=pids)  # noqa: SLF001 - ours
        except OSError:
            group.remove()
            raise
        return group

    def group(self, name: str) -> Group:
        """The group of that name, whether it exists or not."""
        folders = tuple(base / name for base in self._bases)
        return GroupV1(name, folders) if self.version == 1 else GroupV2(name, folders)

    def names(self, prefix: str) -> tuple[str, ...]:
        """Groups whose name starts so, in any hierarchy."""
        found: set[str] = set()
        for base in self._bases:
            with contextlib.suppress(OSError):
                found.update(
                    entry.name
                    for entry in base.iterdir()
                    if entry.name.startswith(prefix) and NAME_PATTERN.fullmatch(entry.name)
                )
        return tuple(sorted(found))

    def reap(self, prefix: str) -> int:
        """Kill and remove every group whose name starts so; how many are gone."""
        groups = [self.group(name) for name in self.names(prefix)]
        return sum(group.remove() for group in groups)


def limit_sockets(memory: Path, memory_bytes: int) -> None:
    """Bound the TCP buffers of a group of version 1, which its memory limit does not count.

    `memory` is its folder in that hierarchy. Raises OSError. Version 2 counts them by itself.
    """
    path = memory / "memory.kmem.tcp.limit_in_bytes"
    if path.exists():  # a kernel without socket accounting has none
        _write(path, str(memory_bytes))


def unavailable(root: Path = ROOT) -> str:
    """Why control groups cannot be used here; empty when they can."""
    try:
        Cgroups(root)
    except CgroupsUnavailableError as error:
        return str(error)
    return ""


def _version(root: Path) -> int:
    missing = [name for name in V1_CONTROLLERS if not (root / name / "cgroup.procs").exists()]
    if not missing:
        shut = [name for name in V1_CONTROLLERS if not os.access(root / name, os.W_OK)]
        if shut:
            raise CgroupsUnavailableError(f"{root / shut[0]} is not writable")
        return 1
    listed = root / "cgroup.controllers"
    if not listed.exists():
        raise CgroupsUnavailableError(f"{root} lacks {', '.join(missing)}")
    absent = set(V2_CONTROLLERS) - set(listed.read_text().split())
    if absent:
        raise CgroupsUnavailableError(f"{root} lacks {', '.join(sorted(absent))}")
    if not os.access(root, os.W_OK):
        raise CgroupsUnavailableError(f"{root} is not writable")
    return 2


def _delegate(root: Path) -> None:
    """Switch the controllers on for groups below `root`."""
    control = root / "cgroup.subtree_control"
    absent = set(V2_CONTROLLERS) - set(control.read_text().split())
    if not absent:
        return
    try:
        _write(control, " ".join(f"+{name}" for name in sorted(absent)))
    except OSError as error:  # EBUSY: processes live in it, as in a container's own group
        raise CgroupsUnavailableError(f"{root} does not delegate: {error.strerror}") from error


def _quota_us(cpu_millis: int) -> int:
    return max(QUOTA_US_MIN, cpu_millis * PERIOD_US // 1000)


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _keyed(path: Path) -> dict[str, int]:
    """Lines of "key number"."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
