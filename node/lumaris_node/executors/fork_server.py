"""The node's side of a fork server: starts it, sends it messages, and knows when it is gone."""

from __future__ import annotations

import array
import json
import os
import socket as stdlib_socket
import sys
from collections.abc import Mapping
from subprocess import DEVNULL

import trio

from lumaris_protocol.errors import LumarisError

READY_S_MAX = 20
SEND_S_MAX = 10


class ForkServer:
    """A small process that guests are forked from, started on first use and again after it died.

    `module` runs with the number of its socket and `argument`; `name` is for messages. It ends,
    with every child, when its socket does, and has `stop_s_max` seconds for that.
    """

    def __init__(
        self,
        module: str,
        argument: str,
        *,
        name: str,
        stop_s_max: float,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        self._command = (module, argument)
        self._name, self._stop_s_max = name, stop_s_max
        self._environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", **(environment or {})}
        self._own_session = own_session
        self._process: trio.Process | None = None
        self._socket: trio.socket.SocketType | None = None
        self._lock = trio.Lock()

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def call(self, message: Mapping[str, str], descriptors: tuple[int, ...]) -> None:
        """Send a message, to a new process if need be. Raises LumarisError `tier_unavailable`."""
        async with self._lock:
            await self._ensure()
            await self._send(message, descriptors)

    async def tell(self, message: Mapping[str, str]) -> None:
        """Send a message to the process if there is one."""
        async with self._lock:
            if self._socket is not None and self._process is not None:
                await self._send(message, ())

    async def aclose(self) -> None:
        """End the process and with it every child."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._stop()

    async def _send(self, message: Mapping[str, str], descriptors: tuple[int, ...]) -> None:
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
            raise LumarisError("tier_unavailable", f"The {self._name} went away.") from error

    async def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        await self._stop()
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        self._socket = trio.socket.from_stdlib_socket(ours)
        module, argument = self._command
        with theirs:
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-m", module, str(theirs.fileno()), argument],
                stdin=DEVNULL,
                stdout=DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=self._own_session,
                env=self._environment,
            )
        with trio.move_on_after(READY_S_MAX):
            if await self._socket.recv(16) == b"ready":
                return
        await self._stop()
        raise LumarisError("tier_unavailable", f"The {self._name} did not start.")

    async def _stop(self) -> None:
        process, self._process = self._process, None
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        if process is None:
            return
        with trio.CancelScope(shield=True):
            with trio.move_on_after(self._stop_s_max):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
