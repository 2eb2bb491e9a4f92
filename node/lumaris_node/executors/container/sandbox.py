"""One running container in which the orders of a lease are run by exec, one after another.

Between two orders it is proven clean from outside: its control group holds the idle process alone,
its temporary folders are empty, and its IPC namespace holds no object. Without that proof it is
removed, and the next order gets a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
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
_REMOVE_TRIES = 3
# Kills have threads of their own: other work must not keep a guest alive past its end.
_KILLS_MAX = 16
_kills = trio.CapacityLimiter(_KILLS_MAX)
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

    def make_ready(self) -> None:
        """What the engine cannot be asked for. Raises LumarisError `platform_error`. Blocks."""
        if self.group is None:
            return
        try:
            self.group.limit_sockets(int(self.request["HostConfig"]["Memory"]))
        except OSError as error:
            why = f"A sandbox's sockets have no limit: {error}"
            raise LumarisError("platform_error", why) from error
        if self.native:
            # The engine gives the mount the mode of the image's own folder. Where that is a link
            # there is no mount, and nothing of ours to open.
            with (
                contextlib.suppress(OSError),
                _opened(self.pid, self.pidfd, TEMPORARY[0]) as folder,
            ):
                os.fchmod(folder, 0o1777)

    def alive(self) -> bool:
        """Whether it can serve another order."""
        return bool(not self.dirty and self.group and self.group.processes() == [self.pid])

    async def kill_guests(self, engine: Engine) -> None:
        """Kill every process but the idle one, and see that they are gone where we can see them.

        Raises LumarisError when some may live on: the sandbox is then lost.
        """
        if self.paused:
            await engine.call("unpause", self.container, ending=True)
            self.paused = False
        if not self.signal_idle(signal.SIGTERM):
            await engine.call("kill", self.container, signal="SIGTERM", ending=True)
        # The idle process is quick, but guests may hold it back; from outside they cannot.
        if self.native and not await trio.to_thread.run_sync(self._kill_others, limiter=_kills):
            raise LumarisError("platform_error", "A sandbox does not end.")

    async def kill_all(self) -> bool:
        """Kill everything in it without the engine, frozen or not; whether none is seen to live."""
        self.dirty = True
        if self.group is None:
            return self.signal_idle(signal.SIGKILL)
        return await trio.to_thread.run_sync(self.group.kill, limiter=_kills)

    def _kill_others(self) -> bool:
        group = self.group
        return group is None or group.quiet(self.pid) or group.kill(spare=self.pid)

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
        return self.alive() and await trio.to_thread.run_sync(self._empty, limiter=_kills)

    async def end(self, engine: Engine) -> bool:
        """Remove it, and kill what it runs even when no engine answers; False if it is left.

        Raises LumarisError `platform_error` when a process of it may live on.
        """
        with trio.CancelScope(shield=True):
            dead = await self.kill_all()
            removed = await remove_container(engine, self.container)
            if self.group is not None:
                dead = dead or not self.group.processes()
            if not (dead or removed):
                raise LumarisError("platform_error", "A sandbox does not end.")
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
        return removed

    def _empty(self) -> bool:
        """Empty the temporary folders; no guest runs, so nothing races with this."""
        try:
            for folder in TEMPORARY:
                _empty_folder(self.pid, self.pidfd, folder)
            with _opened(self.pid, self.pidfd, "/dev/mqueue") as queues:
                if os.listdir(queues):
                    return False
        except OSError:
            return False
        return _no_ipc_objects(self.pid, self.pidfd)


async def remove_container(engine: Engine, container: str) -> bool:
    """Remove a container in any state; whether the engine says that it is gone."""
    for _ in range(_REMOVE_TRIES):
        try:
            await engine.call("remove_container", container, force=True, v=True, ending=True)
        except LumarisError as error:
            text = error.message.lower()
            if "no such container" in text:
                break
            if "in progress" not in text:
                return False
        else:
            break
    await trio.to_thread.run_sync(end_shim, container, limiter=_kills)
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
def _opened(pid: int, pidfd: int, path: str) -> Iterator[int]:
    """A folder mounted in the sandbox. OSError when a part of its path is a link or no mount.

    A link of the image would be followed from *our* root and lead into the host's files.
    """
    folder = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _readable(pidfd):  # the number may be another's by now
            raise OSError("the sandbox has ended")
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


def _readable(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _empty_folder(pid: int, pidfd: int, path: str) -> None:
    with _opened(pid, pidfd, path) as folder:
        for name in os.listdir(folder):
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        if os.listdir(folder):
            raise OSError(f"{path} is not empty")


def _no_ipc_objects(pid: int, pidfd: int) -> bool:
    """Whether the IPC namespace of a process holds no System V object.

    A thread of its own joins it and ends: a thread of the pool would stay inside.
    """
    found: list[bool] = []

    def look() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with open(f"/proc/{pid}/ns/ipc", "rb") as namespace:
                if _readable(pidfd) or libc.setns(namespace.fileno(), _CLONE_NEWIPC) != 0:
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
