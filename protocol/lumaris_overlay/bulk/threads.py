"""Worker threads for blocking connections, whose cancellation breaks the connection."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import trio

from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.wire import Cut, Wire, tune
from lumaris_overlay.links.target import DirectTarget
from lumaris_protocol.limits import BULK_TRANSFERS_MAX

T = TypeVar("T")

FIRST_BYTE: Final = b"\x02"  # what a direct listener tells a bulk connection by
DIAL_S = 5.0  # to connect to one address, and again for the handshake
TOKEN_BYTES: Final = 32

_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("bulk_threads")


def transfer_threads() -> trio.CapacityLimiter:
    """The threads of this program that move files: not those that everything else waits for."""
    try:
        return _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(BULK_TRANSFERS_MAX)
        _threads.set(limiter)
        return limiter


async def in_thread(
    work: Callable[[], T],
    *,
    stop: Callable[[], None],
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Run blocking work; when cancelled, call `stop`, which must make the work end promptly."""
    running = True

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if running:
                stop()

    async with limiter or transfer_threads(), together() as nursery:
        nursery.start_soon(stop_when_cancelled)
        try:
            with trio.CancelScope(shield=True):
                return await trio.to_thread.run_sync(work, limiter=trio.CapacityLimiter(1))
        except Cut:
            await trio.lowlevel.checkpoint_if_cancelled()  # then it is why the work was cut
            raise
        finally:
            running = False
    raise AssertionError("together() passes every failure on")


@asynccontextmanager
async def together() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled when the body ends; of failures of one cause the best is raised.

    That a connection broke says less than anything else that was found.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = _best(group)
    if failure is not None:
        raise failure


def _best(group: BaseExceptionGroup[BaseException]) -> BaseException:
    lost = (Cut, trio.BrokenResourceError, trio.ClosedResourceError)
    found = list(_leaves(group))
    cancelled = [error for error in found if isinstance(error, trio.Cancelled)]
    failures = [error for error in found if not isinstance(error, trio.Cancelled)]
    if any(not isinstance(error, Exception) for error in failures):
        return group
    telling = [error for error in failures if not isinstance(error, lost)]
    return (telling + cancelled + failures)[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def dial(target: DirectTarget, token: str, *, rate: Rate | None = None) -> Wire:
    """A bulk connection to a peer's program. Raises Cut when there is none to be had."""
    raw = await _connect(target)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate is known by its hash, not by a name
    context.verify_mode = ssl.CERT_NONE
    wire = Wire(context.wrap_socket(raw, do_handshake_on_connect=False), rate=rate)
    try:
        await in_thread(lambda: _greet(wire, target.pin, token), stop=wire.stop)
    except BaseException:
        wire.close()
        raise
    return wire


async def _connect(target: DirectTarget) -> socket.socket:
    for host, port in target.addresses:
        family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
        sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
        try:
            with trio.fail_after(DIAL_S):
                await sock.connect((host, port))
                await sock.send(FIRST_BYTE)
            return take_socket(sock)
        except (OSError, trio.TooSlowError):
            pass
        finally:
            sock.close()
    raise Cut("No direct address of the peer answers.")


def take_socket(sock: trio.socket.SocketType) -> socket.socket:
    """The blocking socket in a trio socket, which is closed by that."""
    plain = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    tune(plain)
    return plain


def _greet(wire: Wire, pin: str, token: str) -> None:
    sock = wire.sock
    assert isinstance(sock, ssl.SSLSocket)
    timeout = sock.gettimeout()
    sock.settimeout(DIAL_S)
    try:
        sock.do_handshake()
    except OSError as error:
        raise Cut(str(error)) from None
    found = hashlib.sha256(sock.getpeercert(binary_form=True) or b"").hexdigest()
    if found != pin:  # neither is a secret
        raise Cut("Another program answers at the peer's direct address.")
    sock.settimeout(timeout)
    wire.send(bytes.fromhex(token))
