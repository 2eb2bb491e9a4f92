"""The node's side of the launcher: starts it, hands it jobs, and knows when it is gone."""

from __future__ import annotations

import array
import json
import os
import socket as stdlib_socket
import sys
from pathlib import Path
from subprocess import DEVNULL

import trio

from lumaris_protocol.errors import LumarisError

READY_S_MAX = 20
SEND_S_MAX = 10
STOP_S_MAX = 15  # it may have many groups to kill
LAUNCHER = "lumaris_node.executors.process.launcher"


class LauncherClient:
    """One launcher process, started on first use and again after it died."""

    def __init__(self, cgroup_root: Path) -> None:
        self._cgroup_root = cgroup_root
        self._process: trio.Process | None = None
        self._socket: trio.socket.SocketType | None = None
        self._lock = trio.Lock()

    @property
    def pid(self) -> int | None:
        """The launcher's process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def start_job(self, group: str, descriptors: tuple[int, ...]) -> None:
        """Fork a job into a group that exists; the descriptors are those of `launcher.Given`.

        Raises LumarisError `tier_unavailable` without a launcher.
        """
        async with self._lock:
            await self._ensure()
            await self._send({"op": "start", "group": group}, descriptors)

    async def forget(self, group: str) -> None:
        """The group is gone."""
        async with self._lock:
            if self._socket is not None:
                await self._send({"op": "forget", "group": group}, ())

    async def aclose(self) -> None:
        """End the process and with it every job."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._stop()

    async def _send(self, message: dict[str, str], descriptors: tuple[int, ...]) -> None:
        assert self._socket is not None
        rights = array.array("i", descriptors).tobytes()
        ancillary = [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, rights)]
        try:
            with trio.fail_after(SEND_S_MAX):
                await self._socket.sendmsg(
                    [json.dumps(message).encode()], ancillary if descriptors else []
                )
        except (OSError, trio.TooSlowError) as error:
            await self._stop()
            raise LumarisError("tier_unavailable", "The launcher went away.") from error

    async def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        await self._stop()
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        self._socket = trio.socket.from_stdlib_socket(ours)
        with theirs:
            self._process = await trio.lowlevel.open_process(
                [
                    sys.executable,
                    "-I",
                    "-m",
                    LAUNCHER,
                    str(theirs.fileno()),
                    str(self._cgroup_root),
                ],
                stdin=DEVNULL,
                stdout=DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's interrupt is the node's to answer
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            )
        with trio.move_on_after(READY_S_MAX):
            if await self._socket.recv(16) == b"ready":
                return
        await self._stop()
        raise LumarisError("tier_unavailable", "The launcher did not start.")

    async def _stop(self) -> None:
        process, self._process = self._process, None
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        if process is None:
            return
        with trio.CancelScope(shield=True):
            with trio.move_on_after(STOP_S_MAX):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
