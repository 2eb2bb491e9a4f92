"""The node's side of wasm workers: one for each lease, kept warm between its orders.

A worker that was killed, or that died, is replaced when the lease's next order is prepared; another
lease never gets it. Where this machine lets us, a worker is in a control group of its own: that
throttles a guest that paid for a part of a core, and bounds what a broken runtime could take.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket as stdlib_socket
import time
from pathlib import Path

import trio

from lumaris_node.executors.port import JobSpec
from lumaris_node.executors.wasm.zygote import FOLDERS_MAX, MESSAGE_BYTES_MAX, ZygoteClient
from lumaris_node.sandbox.cgroups import Cgroups, CgroupsUnavailableError, Group
from lumaris_protocol.errors import LumarisError

Facts = dict[str, object]
Folder = tuple[Path, str, bool]  # of this machine, as the guest sees it, writable

RESULT_BYTES_MAX = 4096
REAP_S_MAX = 10
TAKE_S_MAX = 20
# Beside the guest's memory: the interpreter of the worker, the runtime, pages of files it reads.
WORKER_BYTES = 384 * 1024 * 1024
# Threads of the runtime in one process; a guest has one.
WORKER_PIDS = 64
# clock_gettime reads the processor time of any process under this number (CPUCLOCK_SCHED).
CPU_CLOCK = 2


class Lease:
    """One live worker: orders go to its socket, results come from it."""

    def __init__(
        self,
        name: str,
        *,
        zygote: ZygoteClient,
        orders: trio.socket.SocketType,
        lifeline: int,
        pid: int,
    ) -> None:
        self.name, self.pid = name, pid
        self.group: Group | None = None
        self._zygote, self._orders, self._lifeline = zygote, orders, lifeline
        self._doomed = False
        self._facts: Facts | None = None

    @property
    def alive(self) -> bool:
        """Whether it can take another order."""
        if self._doomed or self._lifeline < 0:
            return False
        try:
            os.read(self._lifeline, 1)
        except BlockingIOError:
            return True
        self._doomed = True  # its end was told, or the zygote's
        return False

    async def order(
        self,
        order: Facts,
        *,
        code: Path,
        folders: tuple[Folder, ...],
        stdout: int,
        stderr: int,
        stdin: int | None = None,
    ) -> None:
        """Give it an order. Raises LumarisError `platform_error`."""
        self._facts = None
        if len(folders) > FOLDERS_MAX:
            raise LumarisError("platform_error", "The job has too many folders.")
        order["folders"] = [(guest, writable) for _, guest, writable in folders]
        data = json.dumps(order).encode()
        with contextlib.ExitStack() as opened:
            fds = [stdout, stderr]
            try:
                fds.append(_open(opened, code, os.O_RDONLY))
                fds += [] if stdin is None else [stdin]
                if len(data) > MESSAGE_BYTES_MAX:
                    fds.append(_memory_file(opened, data))
                    data = json.dumps({"long": True, "stdin": stdin is not None}).encode()
                folder_flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                fds += [_open(opened, path, folder_flags) for path, _, _ in folders]
                await self._orders.sendmsg([data], [_rights(fds)])
            except OSError as error:
                raise LumarisError(
                    "platform_error", f"{error.strerror}: the job's worker or folders"
                ) from error

    async def result(self) -> Facts:
        """How the order ended, or what the kernel says of the worker that ended with it."""
        if self._facts is None:
            try:
                data = await self._orders.recv(RESULT_BYTES_MAX)
            except OSError:
                data = b""
            self._facts = _facts(data) if data else await self._end()
        return self._facts

    async def signal(self, operation: str) -> None:
        """`kill`, `stop` or `cont`; one that is gone already is no error."""
        self._doomed = self._doomed or operation == "kill"
        with contextlib.suppress(LumarisError):  # no zygote, so no worker either
            await self._zygote.signal_lease(self.name, operation)

    def cpu_ms(self) -> int:
        """Processor time of the worker so far, of all its orders; 0 when it is gone."""
        try:
            return int(time.clock_gettime((~self.pid << 3) | CPU_CLOCK) * 1000)
        except OSError:
            return 0

    async def destroy(self) -> None:
        """Kill it, wait for its end and remove its group. Idempotent."""
        if self._lifeline < 0:
            return
        with trio.CancelScope(shield=True):
            await self.signal("kill")
            await self._end()
            self._orders.close()
            os.close(self._lifeline)
            self._lifeline = -1
            if self.group is not None:
                await trio.to_thread.run_sync(_remove, self.group)

    async def _end(self) -> Facts:
        """Read the lifeline to its end."""
        said = b""
        with trio.move_on_after(REAP_S_MAX):
            while True:
                await trio.lowlevel.wait_readable(self._lifeline)
                part = os.read(self._lifeline, RESULT_BYTES_MAX)
                if not part:
                    break
                said += part
        self._doomed = True
        facts: Facts = _facts(said.splitlines()[-1]) if said else {"failed": "it went away"}
        if self.group is not None and "signal" in facts:
            facts["oom"] = self.group.facts().oom_kills > 0
        return facts


class Leases:
    """The live workers of this node."""

    def __init__(self, uid: int, *, mark: str) -> None:
        """`uid` is the guests' user; `mark` begins the names of control groups, "" for none."""
        self.zygote = ZygoteClient(uid)
        self._uid, self._mark = uid, mark
        self._held: dict[str, Lease] = {}
        self._cgroups: Cgroups | None = None
        self._groups = 0
        if mark:
            with contextlib.suppress(CgroupsUnavailableError):
                self._cgroups = Cgroups()

    def pid(self, lease: str) -> int | None:
        """The worker of a lease while there is one."""
        held = self._held.get(lease)
        return held.pid if held is not None and held.alive else None

    async def take(self, spec: JobSpec, code: Path) -> Lease:
        """The lease's worker, a new one if it has none. Raises `tier_unavailable`."""
        name = spec.lease or f"job:{spec.job}"
        held = self._held.get(name)
        if held is not None:
            if held.alive:
                return held
            await self.drop(held)
        lease = self._held[name] = await self._begin(name, code)
        try:
            if self._cgroups is not None:
                await trio.to_thread.run_sync(self._confine, self._cgroups, lease, spec)
        except BaseException as error:
            await self.drop(lease)
            if isinstance(error, OSError):
                raise LumarisError("platform_error", f"No control group: {error}") from error
            raise
        return lease

    async def drop(self, lease: Lease) -> None:
        """End one worker."""
        if self._held.get(lease.name) is lease:
            del self._held[lease.name]
        await lease.destroy()

    async def release(self, name: str) -> None:
        """The lease is over."""
        lease = self._held.pop(name, None)
        if lease is not None:
            await lease.destroy()

    def reap_groups(self) -> int:
        """Remove the groups of a killed predecessor; blocks."""
        if self._cgroups is None:
            return 0
        return self._cgroups.reap(f"{self._mark}wasm-")

    async def aclose(self) -> None:
        """End every worker and the zygote."""
        for name in list(self._held):
            await self.release(name)
        await self.zygote.aclose()

    async def _begin(self, name: str, code: Path) -> Lease:
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
            undo.callback(ours.close)
            undo.callback(os.close, reader)
            given.callback(theirs.close)
            given.callback(os.close, writer)
            module = _open(given, code, os.O_RDONLY)
            await self.zygote.take(name, code.name, (theirs.fileno(), writer, module))
            given.close()
            os.set_blocking(reader, False)
            said: Facts = {}
            with trio.move_on_after(TAKE_S_MAX):
                await trio.lowlevel.wait_readable(reader)
                said = _facts(os.read(reader, RESULT_BYTES_MAX))
            pid = said.get("pid")
            if not isinstance(pid, int):
                raise LumarisError("tier_unavailable", "No wasm worker could be started.")
            undo.pop_all()
        orders = trio.socket.from_stdlib_socket(ours)
        return Lease(name, zygote=self.zygote, orders=orders, lifeline=reader, pid=pid)

    def _confine(self, cgroups: Cgroups, lease: Lease, spec: JobSpec) -> None:
        self._groups += 1
        name = f"{self._mark}wasm-{os.getpid()}-{self._groups}"
        lease.group = cgroups.create(
            name,
            memory_bytes=spec.limits.memory_bytes + WORKER_BYTES,
            cpu_millis=spec.limits.cpu_millis,
            pids=WORKER_PIDS,
        )
        lease.group.add(lease.pid)


def _remove(group: Group) -> None:
    if group.kill():
        group.remove()


def _open(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _memory_file(stack: contextlib.ExitStack, data: bytes) -> int:
    fd = os.memfd_create("order", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


def _rights(fds: list[int]) -> tuple[int, int, bytes]:
    return stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, array.array("i", fds).tobytes()


def _facts(data: bytes) -> Facts:
    """One JSON object of a worker or the zygote; a worker that a guest broke may say anything."""
    facts: Facts | None = None
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(data)
    if not isinstance(facts, dict):
        return {"failed": "its result is not one"}
    return facts
