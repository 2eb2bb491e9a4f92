"""Serves an overlay's port on a Unix socket: the inside of the overlay process.

One task per connection. A connection's first frame says what it is (`wire`); a bad one ends that
connection only. Bytes of a stream are copied as they come, both ways, with the end of each
direction passed on by itself.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import secrets
import select
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_overlay.socket import wire
from lumaris_overlay.socket.wire import PeerItem, Reply, Request
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import EnvelopeError, LocalError, LumarisError, RemoteError
from lumaris_protocol.limits import SOCKET_CLAIM_S, SOCKET_STREAMS_WAITING_MAX

logger = logging.getLogger(__name__)

_HEADER_S = 5.0
_COPY_BYTES = 256 * 1024
_CONNECTIONS_MAX = 4_096
_ENDINGS_MAX = 4_096
_HANGUP_CHECK_S = 1.0
# A client that is gone cannot read: its stream is given up when it has been gone this long.
_GONE_S = 2.0

_Answerer = Callable[[trio.SocketStream, Request], Awaitable[None]]


@asynccontextmanager
async def serve_socket(
    overlay: Overlay,
    path: Path,
    *,
    network: str = "",
    coordinator_keys: tuple[str, ...] = (),
    roots: tuple[str, ...] = (),
    shutdown: Callable[[], None] = lambda: None,
) -> AsyncGenerator[SocketServer]:
    """Serve until the context ends; the socket file is then gone.

    Raises LumarisError `already_running` when a live server holds the path, `config_invalid` when
    the path is too long.
    """
    listener = await _listen(path)
    identity = os.stat(path).st_ino
    who = Reply(
        peer=overlay.peer_id, network=network, coordinator_keys=coordinator_keys, roots=roots
    )
    async with background() as nursery:
        server = SocketServer(overlay, nursery, who, shutdown)
        nursery.start_soon(server.run, listener)
        try:
            yield server
        finally:
            _unlink_own(path, identity)


class SocketServer:
    """The connections to one overlay."""

    def __init__(
        self,
        overlay: Overlay,
        nursery: trio.Nursery,
        identity: Reply,
        shutdown: Callable[[], None],
    ) -> None:
        self._overlay = overlay
        self._nursery = nursery
        self._identity = identity
        self._shutdown = shutdown
        self._pipes = _Pipes(nursery)
        self._waiting: dict[str, _Waiting] = {}
        self._operations: dict[str, _Answerer] = {
            "accept": self._accept,
            "adverts": self._adverts,
            "attach": self._attach,
            "connect": self._connect,
            "demand": self._demand,
            "demands": self._demands,
            "ended": self._ended,
            "find": self._find,
            "identity": self._say_identity,
            "notice": self._notice,
            "notices": self._notices,
            "open": self._open,
            "peers": self._peers,
            "ping": self._ping,
            "present": self._present,
            "publish": self._publish,
            "reachability": self._reachability,
            "reset": self._reset,
            "seek": self._seek,
            "serve": self._serve,
            "shards": self._present_shards,
            "shutdown": self._stop,
        }
        self.connections = 0
        self.served = False
        self.idle_since = trio.current_time()

    async def run(self, listener: trio.SocketListener) -> None:
        """Accept connections until cancelled."""
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    # Out of file descriptors, most likely: let some close before going on.
                    logger.warning("accept error=%r", error)
                    await trio.sleep(0.1)
                    continue
                if self.connections >= _CONNECTIONS_MAX:
                    await trio.aclose_forcefully(stream)
                    continue
                self.connections += 1
                self.served = True
                self._nursery.start_soon(self._connection, stream)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away
        except Exception as error:
            logger.warning("socket error=%.300r", error)
        finally:
            self.connections -= 1
            self.idle_since = trio.current_time()

    async def _answer(self, stream: trio.SocketStream) -> None:
        try:
            with trio.fail_after(_HEADER_S):
                request = wire.decode_request(await wire.read_header(stream))
            await self._operations[request.op](stream, request)
        except LumarisError as error:
            await stream.send_all(wire.encode_refusal(error))
        except trio.TooSlowError:
            logger.info("socket event=no_header")

    # --- calls that end with their reply ---

    async def _publish(self, stream: trio.SocketStream, request: Request) -> None:
        await self._overlay.publish_advert(request.envelope)
        await stream.send_all(wire.encode(Reply()))

    async def _connect(self, stream: trio.SocketStream, request: Request) -> None:
        count = await self._overlay.connect(request.addresses)
        await stream.send_all(wire.encode(Reply(count=count)))

    async def _peers(self, stream: trio.SocketStream, request: Request) -> None:
        known = await self._overlay.peers()
        found = tuple(PeerItem(info.peer, info.addresses, info.relayed) for info in known)
        await stream.send_all(wire.encode(Reply(peers=found)))

    async def _reachability(self, stream: trio.SocketStream, request: Request) -> None:
        found = await self._overlay.reachability()
        reply = Reply(
            addresses=found.addresses,
            count=found.peers,
            verdict=found.verdict,
            confirmed_by=found.confirmed_by,
            relays=found.relays,
            observed=found.observed,
        )
        await stream.send_all(wire.encode(reply))

    async def _ping(self, stream: trio.SocketStream, request: Request) -> None:
        found = await self._overlay.ping(request.peer, addresses=request.addresses)
        reply = Reply(
            round_trip_s=found.round_trip_s,
            clock_offset_s=found.clock_offset_s,
            relayed=found.relayed,
        )
        await stream.send_all(wire.encode(reply))

    async def _find(self, stream: trio.SocketStream, request: Request) -> None:
        found = await self._overlay.find_peer(request.peer)
        await stream.send_all(wire.encode(Reply(envelope=found)))

    async def _present(self, stream: trio.SocketStream, request: Request) -> None:
        await self._overlay.present(request.envelope)
        await stream.send_all(wire.encode(Reply()))

    async def _present_shards(self, stream: trio.SocketStream, request: Request) -> None:
        await self._overlay.present_shards(request.envelope)
        await stream.send_all(wire.encode(Reply()))

    async def _seek(self, stream: trio.SocketStream, request: Request) -> None:
        if request.needs is None:
            raise EnvelopeError("malformed", "Requirements are needed.")
        await self._overlay.seek(request.needs)
        await stream.send_all(wire.encode(Reply()))

    async def _demand(self, stream: trio.SocketStream, request: Request) -> None:
        await self._overlay.publish_demand(request.envelope)
        await stream.send_all(wire.encode(Reply()))

    async def _notice(self, stream: trio.SocketStream, request: Request) -> None:
        await self._overlay.publish_notice(request.envelope)
        await stream.send_all(wire.encode(Reply()))

    async def _say_identity(self, stream: trio.SocketStream, request: Request) -> None:
        await stream.send_all(wire.encode(self._identity))

    async def _stop(self, stream: trio.SocketStream, request: Request) -> None:
        await stream.send_all(wire.encode(Reply()))
        self._shutdown()

    async def _ended(self, stream: trio.SocketStream, request: Request) -> None:
        await stream.send_all(wire.encode(Reply(clean=self._pipes.ended_clean(request.id))))

    async def _reset(self, stream: trio.SocketStream, request: Request) -> None:
        await self._pipes.reset(request.id)
        await stream.send_all(wire.encode(Reply()))

    # --- calls that last ---

    async def _attach(self, stream: trio.SocketStream, request: Request) -> None:
        await stream.send_all(wire.encode(self._identity))
        await _until_gone(stream)

    async def _adverts(self, stream: trio.SocketStream, request: Request) -> None:
        async with self._overlay.adverts() as events, background() as nursery:
            nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await stream.send_all(wire.encode(Reply()))
            async for event in events:
                await stream.send_all(
                    wire.encode(Reply(seller=event.seller, seq=event.seq, envelope=event.envelope))
                )

    async def _demands(self, stream: trio.SocketStream, request: Request) -> None:
        async with self._overlay.demands() as events, background() as nursery:
            nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await stream.send_all(wire.encode(Reply()))
            async for event in events:
                await stream.send_all(wire.encode(Reply(peer=event.buyer, envelope=event.envelope)))

    async def _notices(self, stream: trio.SocketStream, request: Request) -> None:
        async with self._overlay.notices() as notices, background() as nursery:
            nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await stream.send_all(wire.encode(Reply()))
            async for each in notices:
                reply = Reply(
                    kind=each.kind, peer=each.signer, seq=each.seq, envelope=each.envelope
                )
                await stream.send_all(wire.encode(reply))

    async def _serve(self, stream: trio.SocketStream, request: Request) -> None:
        order = trio.Lock()

        async def inbound(peer_stream: OverlayStream) -> None:
            if len(self._waiting) >= SOCKET_STREAMS_WAITING_MAX:
                raise LocalError("queue_full", "Too many inbound streams wait for their client.")
            token = secrets.token_hex(16)
            waiting = self._waiting[token] = _Waiting(peer_stream)
            try:
                with trio.fail_after(SOCKET_CLAIM_S):
                    async with order:
                        await stream.send_all(
                            wire.encode(Reply(token=token, peer=peer_stream.peer))
                        )
                    await waiting.claimed.wait()
            finally:
                self._waiting.pop(token, None)
            await waiting.finished.wait()
            if not waiting.clean:
                await peer_stream.reset()

        async with self._overlay.serve(request.protocol, inbound):
            await stream.send_all(wire.encode(Reply()))
            await _until_gone(stream)

    # --- streams ---

    async def _open(self, stream: trio.SocketStream, request: Request) -> None:
        opened = await self._overlay.open_stream(
            request.peer, request.protocol, addresses=request.addresses
        )
        await self._pipes.join(stream, opened)
        await opened.aclose()

    async def _accept(self, stream: trio.SocketStream, request: Request) -> None:
        waiting = self._waiting.pop(request.token, None)
        if waiting is None:
            raise RemoteError("not_found", "The stream was not claimed in time.")
        waiting.claimed.set()
        try:
            waiting.clean = await self._pipes.join(stream, waiting.stream)
        finally:
            waiting.finished.set()


@dataclass
class _Waiting:
    """An inbound stream whose client has been told of it."""

    stream: OverlayStream
    claimed: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)
    clean: bool = False


class _Pipes:
    """The streams being copied, by id, and how the latest ones ended."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._ids = itertools.count(1)
        self._live: dict[int, OverlayStream] = {}
        self._clean: dict[int, bool] = {}

    def ended_clean(self, number: int) -> bool:
        """Whether the peer's side of the stream ended with its end of stream."""
        return self._clean.get(number, False)

    async def reset(self, number: int) -> None:
        """Break a stream both ways, if it still runs."""
        stream = self._live.get(number)
        if stream is not None:
            await stream.reset()

    async def join(self, local: trio.SocketStream, remote: OverlayStream) -> bool:
        """Copy both ways until both have ended; whether both ended in order."""
        number = next(self._ids)
        self._live[number] = remote
        clean = False
        try:
            await local.send_all(wire.encode(Reply(id=number, peer=remote.peer)))
            async with background() as nursery:
                done = trio.Event()
                nursery.start_soon(self._outward, local, remote, done, nursery.cancel_scope)
                clean = await self._inward(number, local, remote)
                if clean:
                    await done.wait()
        finally:
            del self._live[number]
            if not clean:
                await remote.reset()
        return clean

    async def _inward(self, number: int, local: trio.SocketStream, remote: OverlayStream) -> bool:
        try:
            while data := await remote.receive_some(_COPY_BYTES):
                await local.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        while len(self._clean) >= _ENDINGS_MAX:
            del self._clean[next(iter(self._clean))]
        self._clean[number] = True
        try:
            await local.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return True  # the client has left too, having had all there was
        return True

    async def _outward(
        self,
        local: trio.SocketStream,
        remote: OverlayStream,
        done: trio.Event,
        scope: trio.CancelScope,
    ) -> None:
        try:
            while data := await local.receive_some(_COPY_BYTES):
                await remote.send_all(data)
            await remote.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # Nobody takes what the client says; what the peer says may still be of use to it.
            pass
        done.set()
        await _until_hung_up(local)
        # The client closed both ways: nobody is left to read what the peer still says.
        await trio.sleep(_GONE_S)
        scope.cancel()


async def _until_gone(stream: trio.SocketStream) -> None:
    """Until the client closes; anything it sends instead ends the connection too."""
    await stream.receive_some(1)


async def _cancel_when_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await _until_gone(stream)
    scope.cancel()


async def _until_hung_up(stream: trio.SocketStream) -> None:
    """Until the other end is closed both ways, which a read does not show after its end."""
    poller = select.poll()
    poller.register(stream.socket.fileno(), 0)
    while not poller.poll(0):  # noqa: ASYNC110 - no event tells of it
        await trio.sleep(_HANGUP_CHECK_S)


async def _listen(path: Path) -> trio.SocketListener:
    text = wire.socket_path(path)
    _make_private(path.parent)
    if await _is_live(text):
        raise LumarisError("already_running", f"An overlay serves {path} already.")
    _unlink_stale(path)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        await sock.bind(text)
        os.chmod(path, 0o600)  # nobody can connect before listen
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise LumarisError("not_writable", f"{path}: {error.strerror}.") from None
    return trio.SocketListener(sock)


def _unlink_stale(path: Path) -> None:
    if path.exists() and not path.is_socket():
        raise LumarisError("config_invalid", f"{path} exists and is not a socket.")
    path.unlink(missing_ok=True)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        # A shared directory such as /tmp is not ours to close; there the socket's own mode counts.
        if found.st_uid == os.getuid() and not found.st_mode & stat.S_ISVTX:
            directory.chmod(0o700)
    except OSError as error:
        raise LumarisError("not_writable", f"{directory}: {error.strerror}.") from None


async def _is_live(path: str) -> bool:
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
        try:
            await sock.connect(path)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK)
    return True


def _unlink_own(path: Path, identity: int) -> None:
    """Remove our socket file, and not that of a successor."""
    try:
        if os.stat(path).st_ino == identity:
            os.unlink(path)
    except FileNotFoundError:
        pass
