"""The overlay as its clients see it: every call goes to the overlay process over a Unix socket.

The process may die and come back. Calls wait a while for it; `adverts` and `serve` go on where
they were, and the certificate and the last advert of each seller that was published are told again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio
from msgspec import structs

from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.latest_feed import LatestFeed
from lumaris_overlay.ports import (
    AdvertEvent,
    DemandEvent,
    Notice,
    OverlayStream,
    PeerInfo,
    Ping,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.socket import wire
from lumaris_overlay.socket.adverts import LOST, RETRY_S, AdvertFollower
from lumaris_overlay.socket.stream import PipeStream
from lumaris_overlay.socket.wire import Reply, Request
from lumaris_overlay.tasks import background
from lumaris_protocol import limits
from lumaris_protocol.envelope import decode
from lumaris_protocol.errors import EnvelopeError, LumarisError, RemoteError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.messages.negotiation import Requirements

logger = logging.getLogger(__name__)

_CALL_S = 20.0
_ATTACH_S = 10.0
_OWN_MAX = 16


@asynccontextmanager
async def open_socket_overlay(path: Path) -> AsyncGenerator[SocketOverlay]:
    """The overlay behind a socket. Raises RemoteError `unreachable` when nothing answers there."""
    async with background() as nursery:
        overlay = SocketOverlay(path, nursery)
        await overlay.attach()
        yield overlay


class SocketOverlay:
    """Client of the overlay process; implements `ports.Overlay`."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._path = wire.socket_path(path)
        self._nursery = nursery
        self._handlers = HandlerTable()
        self._identity = Reply()
        self._attached = trio.Event()
        self._own: dict[str, bytes] = {}
        self._certificate = b""
        self._published: dict[bytes, None] = {}

    @property
    def peer_id(self) -> PeerId:
        """The peer id of the overlay process."""
        return PeerId(self._identity.peer)

    @property
    def network(self) -> str:
        """The network the overlay process is on."""
        return self._identity.network

    @property
    def coordinator_keys(self) -> frozenset[PeerId]:
        """The coordinators whose certificates the overlay process accepts."""
        return frozenset(PeerId(key) for key in self._identity.coordinator_keys)

    async def attach(self, *, timeout_s: float = _ATTACH_S) -> None:
        """Connect and stay connected while the nursery lives. Raises RemoteError `unreachable`."""
        self._nursery.start_soon(self._stay_attached)
        await self._wait_attached(timeout_s)

    async def identity(self) -> Reply:
        """Who answers on the socket now. Raises RemoteError `unreachable`."""
        return await self._call(Request("identity"), wait=False)

    async def shutdown(self) -> None:
        """Ask the overlay process to end."""
        await self._call(Request("shutdown"), wait=False)

    # --- the port ---

    async def present(self, certificate: bytes) -> None:
        """Show this membership certificate from now on. Raises EnvelopeError."""
        await self._call(Request("present", envelope=certificate))
        self._certificate = certificate

    async def present_shards(self, envelope: bytes) -> None:
        """Divide the market by this map, which the process keeps. Raises EnvelopeError."""
        if len(envelope) > limits.SHARD_MAP_BYTES_MAX:
            raise EnvelopeError("oversize", "The shard map is too long.")
        await self._call(Request("shards", envelope=envelope))

    async def seek(self, needs: Requirements) -> None:
        """Have the adverts that may fit these requirements in the directory."""
        # Who is excluded changes from run to run and says nothing of where to look.
        await self._call(Request("seek", needs=structs.replace(needs, excluded=())))

    async def publish_demand(self, envelope: bytes) -> None:
        """Gossip our signed demand to the sellers. Raises EnvelopeError when it is not valid."""
        await self._call(Request("demand", envelope=envelope))

    async def publish_notice(self, envelope: bytes) -> None:
        """Gossip what a coordinator signed for everybody. Raises EnvelopeError."""
        if len(envelope) > limits.NOTICE_BYTES_MAX:
            raise EnvelopeError("oversize", "The notice is too long.")
        await self._call(Request("notice", envelope=envelope))
        self._published[envelope] = None
        while len(self._published) > limits.NOTICES_KEPT_MAX:
            del self._published[next(iter(self._published))]

    async def find_peer(self, peer: str) -> bytes | None:
        """The newest signed record of a peer, from the directory or the DHT."""
        if len(peer) > limits.NAME_CHARS_MAX:
            return None
        return (await self._call(Request("find", peer=peer))).envelope

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        """Ask a peer for its time. Raises RemoteError `unreachable`."""
        if len(peer) > limits.NAME_CHARS_MAX:
            raise RemoteError("unreachable", "That is not a peer id.")
        reply = await self._call(Request("ping", peer=peer, addresses=tuple(addresses)))
        return Ping(reply.round_trip_s, reply.clock_offset_s, reply.relayed)

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our advert. Raises EnvelopeError when it would be refused by any honest peer."""
        await self._call(Request("publish", envelope=envelope))
        seller = decode(envelope).signer
        self._own.pop(seller, None)
        self._own[seller] = envelope
        while len(self._own) > _OWN_MAX:
            del self._own[next(iter(self._own))]

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        return (await self._call(Request("connect", addresses=tuple(addresses)))).count

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers the overlay process is connected to."""
        reply = await self._call(Request("peers"))
        return tuple(
            PeerInfo(PeerId(item.peer), item.addresses, item.relayed) for item in reply.peers
        )

    async def reachability(self) -> Reachability:
        """Where the overlay process can be reached."""
        reply = await self._call(Request("reachability"))
        return Reachability(
            reply.addresses,
            reply.count,
            reply.verdict,
            tuple(PeerId(peer) for peer in reply.confirmed_by),
            tuple(PeerId(peer) for peer in reply.relays),
            reply.observed,
        )

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream to a peer. Raises RemoteError `unreachable`."""
        request = Request("open", peer=peer, protocol=protocol, addresses=tuple(addresses))
        if len(peer) > 64 or len(protocol) > 64:
            raise RemoteError("unreachable", "That is not a peer id and a protocol.")
        return await self._open_pipe(request, peer, protocol)

    @asynccontextmanager
    async def adverts(self) -> AsyncGenerator[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change; across restarts."""
        feed = AdvertFeed(self._nursery)
        scope = trio.CancelScope()

        async def follow() -> None:
            with scope:
                await AdvertFollower(self._ask, feed).run()

        async with feed.follow(()) as events:
            self._nursery.start_soon(follow)
            try:
                yield events
            finally:
                scope.cancel()

    @asynccontextmanager
    async def demands(self) -> AsyncGenerator[trio.MemoryReceiveChannel[DemandEvent]]:
        """Each demand of other peers from now on; across restarts."""
        feed = LatestFeed[DemandEvent]()
        pipe, reader = await self._ask(Request("demands"))
        scope = trio.CancelScope()

        async def listen() -> None:
            with scope:
                await self._follow_demands(feed, pipe, reader)

        async with feed.follow() as events:
            self._nursery.start_soon(listen)
            try:
                yield events
            finally:
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(pipe)

    @asynccontextmanager
    async def notices(self) -> AsyncGenerator[trio.MemoryReceiveChannel[Notice]]:
        """First what is known of the coordinators' notices, then each new one; across restarts."""
        feed = LatestFeed[Notice]()
        pipe, reader = await self._ask(Request("notices"))
        scope = trio.CancelScope()

        async def listen() -> None:
            with scope:
                await self._follow_notices(feed, pipe, reader)

        async with feed.follow() as events:
            self._nursery.start_soon(listen)
            try:
                yield events
            finally:
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(pipe)

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractAsyncContextManager[None]:
        """Answer streams of a protocol while the context lasts; across restarts."""
        return self._serve(protocol, handler)

    @asynccontextmanager
    async def _serve(self, protocol: str, handler: StreamHandler) -> AsyncGenerator[None]:
        async with self._handlers.serve(protocol, handler):
            pipe, reader = await self._ask(Request("serve", protocol=protocol))
            scope = trio.CancelScope()

            async def listen() -> None:
                with scope:
                    await self._keep_serving(protocol, pipe, reader)

            self._nursery.start_soon(listen)
            try:
                yield
            finally:
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(pipe)

    # --- how ---

    async def _follow_demands(
        self, feed: LatestFeed[DemandEvent], pipe: trio.SocketStream, reader: FrameReader
    ) -> None:
        while True:
            try:
                async with pipe:
                    while (frame := await reader.next()) is not None:
                        said = wire.decode_reply(frame)
                        feed.tell(DemandEvent(PeerId(said.peer), said.envelope or b""))
            except (*LOST, LumarisError) as error:
                logger.info("demands lost=%r", error)
            pipe, reader = await self._ask_until_heard(Request("demands"))

    async def _follow_notices(
        self, feed: LatestFeed[Notice], pipe: trio.SocketStream, reader: FrameReader
    ) -> None:
        told: dict[bytes, None] = {}  # a restarted process tells what it knows once more
        while True:
            try:
                async with pipe:
                    while (frame := await reader.next()) is not None:
                        said = wire.decode_reply(frame)
                        data = said.envelope or b""
                        if data not in told:
                            feed.tell(Notice(said.kind, PeerId(said.peer), said.seq, data))
                        told[data] = None
                        while len(told) > limits.NOTICES_KEPT_MAX:
                            del told[next(iter(told))]
            except (*LOST, LumarisError) as error:
                logger.info("notices lost=%r", error)
            pipe, reader = await self._ask_until_heard(Request("notices"))

    async def _ask_until_heard(self, request: Request) -> tuple[trio.SocketStream, FrameReader]:
        """Begin a call that lasts, as soon as the overlay process is there."""
        while True:
            await self._attached.wait()
            try:
                return await self._ask(request)
            except LumarisError as error:
                logger.info("op=%s again=%r", request.op, error)
                await trio.sleep(RETRY_S)

    async def _keep_serving(
        self, protocol: str, pipe: trio.SocketStream, reader: FrameReader
    ) -> None:
        while True:
            try:
                async with pipe:
                    while (frame := await reader.next()) is not None:
                        reply = wire.decode_reply(frame)
                        self._nursery.start_soon(self._accept, reply, protocol)
            except LOST as error:
                logger.info("serve protocol=%s lost=%r", protocol, error)
            pipe, reader = await self._ask_until_heard(Request("serve", protocol=protocol))

    async def _accept(self, inbound: Reply, protocol: str) -> None:
        try:
            stream = await self._open_pipe(
                Request("accept", token=inbound.token), inbound.peer, protocol
            )
        except LumarisError as error:
            logger.info("accept protocol=%s error=%r", protocol, error)
            return
        await self._handlers.answer(stream)

    async def _open_pipe(self, request: Request, peer: str, protocol: str) -> PipeStream:
        try:
            with trio.fail_after(_CALL_S):
                pipe = await self._dial(request)
                try:
                    reply = wire.decode_reply(await wire.read_header(pipe))
                except BaseException:
                    await trio.aclose_forcefully(pipe)
                    raise
        except trio.TooSlowError:
            raise RemoteError("unreachable", "The overlay process does not answer.") from None
        except LOST as error:
            raise _unreachable(error) from error
        return PipeStream(
            pipe,
            peer,
            protocol,
            number=reply.id,
            ended_clean=self._ended_clean,
            reset=self._reset,
        )

    async def _ended_clean(self, number: int) -> bool:
        try:
            return (await self._call(Request("ended", id=number), wait=False)).clean
        except LumarisError:
            return False

    async def _reset(self, number: int) -> None:
        try:
            await self._call(Request("reset", id=number), wait=False)
        except LumarisError as error:
            logger.debug("reset error=%r", error)

    async def _call(self, request: Request, *, wait: bool = True) -> Reply:
        """Ask and be answered. All calls may be repeated, so one cut off by a restart is."""
        deadline = trio.current_time() + (_ATTACH_S if wait else 0.0)
        while True:
            try:
                with trio.fail_after(_CALL_S):
                    return await self._call_once(request, wait=wait)
            except trio.TooSlowError:
                raise RemoteError("unreachable", "The overlay process does not answer.") from None
            except EnvelopeError as error:
                if error.code != "truncated":
                    raise
                lost: Exception = error
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                lost = error
            if trio.current_time() >= deadline:
                raise _unreachable(lost) from lost
            await trio.sleep(RETRY_S)

    async def _call_once(self, request: Request, *, wait: bool) -> Reply:
        pipe = await self._dial(request, wait=wait)
        try:
            return wire.decode_reply(await wire.reply_reader(pipe).next())
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(pipe)

    async def _ask(self, request: Request) -> tuple[trio.SocketStream, FrameReader]:
        """Begin a call that lasts; its first reply has been read."""
        pipe = None
        try:
            with trio.fail_after(_CALL_S):
                pipe = await self._dial(request)
                reader = wire.reply_reader(pipe)
                wire.decode_reply(await reader.next())
                done, pipe = pipe, None
                return done, reader
        except trio.TooSlowError:
            raise RemoteError("unreachable", "The overlay process does not answer.") from None
        except LOST as error:
            raise _unreachable(error) from error
        finally:
            if pipe is not None:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(pipe)

    async def _dial(self, request: Request, *, wait: bool = True) -> trio.SocketStream:
        pipe = await self._open_socket(_ATTACH_S if wait else 0.0)
        try:
            await pipe.send_all(wire.encode(request))
        except BaseException:
            await trio.aclose_forcefully(pipe)
            raise
        return pipe

    async def _open_socket(self, wait_s: float) -> trio.SocketStream:
        """A connection; while nobody listens, nothing was asked yet and it is tried again."""
        deadline = trio.current_time() + wait_s
        while True:
            try:
                return await trio.open_unix_socket(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                if trio.current_time() >= deadline:
                    raise RemoteError(
                        "unreachable", "The overlay process is not running."
                    ) from None
            await trio.sleep(RETRY_S)

    async def _wait_attached(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._attached.wait()
            return
        raise RemoteError("unreachable", "The overlay process is not running.")

    async def _stay_attached(self) -> None:
        first = True
        while True:
            try:
                pipe = await self._dial(Request("attach"), wait=False)
                async with pipe:
                    reader = wire.reply_reader(pipe)
                    self._identity = wire.decode_reply(await reader.next())
                    self._attached.set()
                    if not first:
                        self._nursery.start_soon(self._tell_again)
                    first = False
                    await reader.next()
            except (*LOST, LumarisError) as error:
                logger.debug("attach error=%r", error)
            if self._attached.is_set():
                self._attached = trio.Event()
            await trio.sleep(RETRY_S)

    async def _tell_again(self) -> None:
        again = [Request("notice", envelope=envelope) for envelope in self._published]
        again += [Request("publish", envelope=envelope) for envelope in self._own.values()]
        if self._certificate:
            again.insert(0, Request("present", envelope=self._certificate))
        for request in again:
            try:
                await self._call(request)
            except LumarisError as error:  # expired by now, or the process is gone again
                logger.info("op=%s again error=%r", request.op, error)


def _unreachable(error: Exception) -> RemoteError:
    return RemoteError("unreachable", f"The overlay process went away ({error}).")
