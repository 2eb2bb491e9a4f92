"""The node's side of the wasm zygote: starts it, has it give out workers, and knows its end."""

from __future__ import annotations

import array
import json
import os
import socket as stdlib_socket
import sys
from subprocess import DEVNULL

import trio

from lumaris_protocol.errors import LumarisError

READY_S_MAX = 20
SEND_S_MAX = 10
STOP_S_MAX = 5
# What a worker takes in one message; a longer order comes in a file.
MESSAGE_BYTES_MAX = 32 * 1024
FOLDERS_MAX = 16
WORKER = "lumaris_node.executors.wasm.worker"


class ZygoteClient:
    """One zygote process, started on first use and again after it died."""

    def __init__(self, uid: int) -> None:
        """`uid` is the user of the guests, 0 for this process's own."""
        self._uid = uid
        self._process: trio.Process | None = None
        self._socket: trio.socket.SocketType | None = None
        self._lock = trio.Lock()

    @property
    def pid(self) -> int | None:
        """The zygote's process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def take(self, lease: str, module: str, descriptors: tuple[int, ...]) -> None:
        """Give a lease a worker: the socket of its orders, its lifeline, a module's code.

        Raises LumarisError `tier_unavailable` without a zygote.
        """
        async with self._lock:
            await self._ensure()
            await self._send({"op": "take", "lease": lease, "module": module}, descriptors)

    async def signal_lease(self, lease: str, operation: str) -> None:
        """`kill`, `stop` or `cont` a lease's worker; one that is gone already is no error."""
        async with self._lock:
            if self._socket is not None and self._process is not None:
                await self._send({"op": operation, "lease": lease}, ())

    async def aclose(self) -> None:
        """End the process and with it every child."""
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
            raise LumarisError("tier_unavailable", "The wasm worker went away.") from error

    async def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        await self._stop()
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        self._socket = trio.socket.from_stdlib_socket(ours)
        with theirs:
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-m", WORKER, str(theirs.fileno()), str(self._uid)],
                stdin=DEVNULL,
                stdout=DEVNULL,
                pass_fds=[theirs.fileno()],
                # One worker thread is enough for a guest that has one thread.
                env={"PATH": os.defpath, "TOKIO_WORKER_THREADS": "1", "LC_ALL": "C.UTF-8"},
            )
        with trio.move_on_after(READY_S_MAX):
            if await self._socket.recv(16) == b"ready":
                return
        await self._stop()
        raise LumarisError("tier_unavailable", "The wasm worker did not start.")

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
