"""One running container in which the orders of a lease are run by exec, one after another.

Between two orders it is proven clean from outside: its control group holds the idle process alone,
its temporary folders are empty, and its IPC namespace holds no object. Without that proof it is
removed, and the next order gets a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lumaris_node.executors.container.cgroup import ContainerGroup
from lumaris_node.executors.container.config import TEMPORARY
from lumaris_node.executors.container.engine import Engine
from lumaris_protocol.errors import LumarisError

# Killed processes are gone within milliseconds, unless the disk keeps them.
_QUIET_S_MAX = 2.0
_QUIET_POLL_S = 0.002
_REMOVE_TRIES = 3
_CLONE_NEWIPC = 0x08000000


@dataclass
class Sandbox:
    """A started container. `pid` is its idle process as this machine knows it, 0 if it does not.

    `group` is None where the kernel's facts cannot be read. `native`: its processes are this
    kernel's own; where they are not (gVisor, Kata), or without facts, it serves one order.
    """

    container: str
    request: dict[str, Any]
    folders: tuple[tuple[int, int], ...]
    native: bool = True
    pid: int = 0
    pidfd: int = -1
    group: ContainerGroup | None = None
    busy: bool = False
    paused: bool = False
    dirty: bool = False

    def watch(self, pid: int) -> None:
        """Learn the kernel's facts of it from its first process. Blocks."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            group = ContainerGroup.of(pid, self.container)
            if group is None:
                os.close(pidfd)
            else:
                self.pid, self.pidfd, self.group = pid, pidfd, group

    def alive(self) -> bool:
        """Whether it can serve another order."""
        return bool(not self.dirty and self.group and self.group.processes() == [self.pid])

    async def kill_guests(self, engine: Engine) -> None:
        """Kill every process but the idle one. Raises LumarisError when the engine fails us."""
        if self.paused:
            await engine.call("unpause", self.container)
            self.paused = False
        if not self.signal_idle(signal.SIGTERM):
            await engine.call("kill", self.container, signal="SIGTERM")

    def signal_idle(self, number: signal.Signals) -> bool:
        """Send a signal to the idle process without the engine; False where that is not allowed."""
        if self.pidfd < 0 or (number != signal.SIGKILL and not self.native):
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            return False
        return True

    async def clean(self, engine: Engine) -> bool:
        """Make it ready for the next order; False when that cannot be proven."""
        if self.group is None or not self.native or self.dirty:
            return False
        try:
            await self.kill_guests(engine)
        except LumarisError:
            return False
        return await self._quiet() and await trio.to_thread.run_sync(self._empty)

    async def end(self, engine: Engine) -> bool:
        """Remove it, and kill what it runs even when no engine answers; False if it is left."""
        with trio.CancelScope(shield=True):
            self.dirty = True
            if not self.paused:
                self.signal_idle(signal.SIGKILL)
            left = not await remove_container(engine, self.container)
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
        return not left

    async def _quiet(self) -> bool:
        """Whether the idle process is soon alone in the group."""
        assert self.group is not None
        with trio.move_on_after(_QUIET_S_MAX):
            while self.group.processes() != [self.pid]:  # noqa: ASYNC110 - the kernel has no event
                await trio.sleep(_QUIET_POLL_S)
            return True
        return False

    def _empty(self) -> bool:
        """Empty the temporary folders; no guest runs, so nothing races with this."""
        try:
            for folder in TEMPORARY:
                _empty_folder(self.pid, folder)
            with _opened(self.pid, "/dev/mqueue") as queues:
                if os.listdir(queues):
                    return False
        except OSError:
            return False
        return _no_ipc_objects(self.pid)


async def remove_container(engine: Engine, container: str) -> bool:
    """Remove a container in any state; whether the engine says that it is gone."""
    for _ in range(_REMOVE_TRIES):
        try:
            await engine.call("remove_container", container, force=True, v=True)
        except LumarisError as error:
            text = error.message.lower()
            if "no such container" in text:
                break
            if "in progress" not in text:
                return False
        else:
            break
    await trio.to_thread.run_sync(end_shim, container)
    return True


def end_shim(container: str) -> int:
    """Kill the shims that engines leave behind when a start fails; how many there were. Blocks."""
    found, needle = 0, container.encode()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in words[0] and needle in words:
                os.kill(int(name), signal.SIGKILL)
                found += 1
    return found


def folder_identity(*folders: Path) -> tuple[tuple[int, int], ...]:
    """What a mount of these folders shows: one made anew under the same name is another."""
    states = [folder.stat() for folder in folders]
    return tuple((state.st_dev, state.st_ino) for state in states)


@contextlib.contextmanager
def _opened(pid: int, path: str) -> Iterator[int]:
    """A folder mounted in the sandbox. OSError when a part of its path is a link or no mount.

    A link of the image would be followed from *our* root and lead into the host's files.
    """
    folder = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY)
    try:
        root = os.fstat(folder).st_dev
        for name in path.strip("/").split("/"):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        if os.fstat(folder).st_dev in (root, os.stat("/").st_dev):
            raise OSError(f"{path} is no file system of its own")
        yield folder
    finally:
        os.close(folder)


def _empty_folder(pid: int, path: str) -> None:
    with _opened(pid, path) as folder:
        for name in os.listdir(folder):
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        if os.listdir(folder):
            raise OSError(f"{path} is not empty")


def _no_ipc_objects(pid: int) -> bool:
    """Whether the IPC namespace of a process holds no System V object.

    A thread of its own joins it and ends: a thread of the pool would stay inside.
    """
    found: list[bool] = []

    def look() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with open(f"/proc/{pid}/ns/ipc", "rb") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWIPC) != 0:
                    return
            tables = [Path("/proc/sysvipc", name).read_text("ascii") for name in _SYSV]
        except (OSError, ValueError):
            return
        found.append(all(table.count("\n") <= 1 for table in tables))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_QUIET_S_MAX)
    return found == [True]


_SYSV = ("shm", "sem", "msg")  # each a header line and a line an object
