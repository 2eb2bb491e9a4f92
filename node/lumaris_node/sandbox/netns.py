"""Sockets inside a guest's network namespace, made from outside: all that forwarding is built on.

A socket belongs for ever to the namespace of the thread that made it. The thread is one of its
own, never of a pool, and ends in the other namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading

import trio

from lumaris_protocol.errors import LumarisError

CONNECT_S_MAX = 10
BACKLOG = 64
CLONE_NEWNET = 0x40000000
LOOPBACK = "127.0.0.1"


async def connect(pid: int, port: int) -> trio.SocketStream:
    """A connection to 127.0.0.1:`port` in the namespace of process `pid`.

    Raises LumarisError `not_attached` without that namespace, `unreachable` if nobody listens.
    """
    sock = trio.socket.from_stdlib_socket(await _socket(pid))
    try:
        with trio.fail_after(CONNECT_S_MAX):
            await sock.connect((LOOPBACK, port))
    except (OSError, trio.TooSlowError) as error:
        sock.close()
        raise LumarisError("unreachable", f"Nothing answers on port {port} of the job.") from error
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def listen(pid: int, port: int) -> trio.SocketListener:
    """A listener on 127.0.0.1:`port` in the namespace of process `pid`; port 0 takes any.

    Raises LumarisError `not_attached` without that namespace, `port_in_use`.
    """
    sock = await _socket(pid)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise LumarisError("port_in_use", f"Port {port} of the job is in use.") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def _socket(pid: int) -> socket.socket:
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            made.append(_socket_in(pid))
        except OSError as error:
            failed.append(error)

    def run() -> None:
        thread = threading.Thread(target=enter, name=f"netns-{pid}")
        thread.start()
        thread.join()

    await trio.to_thread.run_sync(run)
    if failed:
        raise LumarisError("not_attached", "The job's network is not there.") from failed[0]
    return made[0]


def _socket_in(pid: int) -> socket.socket:
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, namespace)
        ours = os.stat("/proc/self/ns/net")
        if os.path.samestat(os.fstat(namespace), ours):
            # The process ended and its number went to one of this machine's own.
            raise ProcessLookupError("not a sandbox")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
