"""How coordinators' notices come and go: by gossip, and by `/lumaris/notices/1` for newcomers.

A new connection asks for what it lacks: a HEADER {have} with the hashes of what it keeps, then
documents that are news to the other side as ENVELOPE frames, then END. The answer is the ENVELOPE
frames of what is not in `have`, and END. Each document is checked as if it came by gossip.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
import trio
from libp2p.custom_types import TProtocol
from msgspec import Meta

from lumaris_overlay.advert_file import AdvertFile
from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.latest_feed import LatestFeed
from lumaris_overlay.libp2p.guarded_pubsub import Judgement
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.notices import NoticeBoard
from lumaris_overlay.ports import Notice, OverlayStream
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import frames, limits
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.protocols import NOTICES as PROTOCOL

logger = logging.getLogger(__name__)

_EXCHANGE_S = 10.0
_SAVE_CHECK_S = 60.0
_FRAME_MAX = limits.NOTICE_BYTES_MAX + 64
_PUSHED_MAX = 4
# Several peers know as much as all; more are asked when time has passed.
_ASKED_MAX, _ASK_AGAIN_S = 4, 60.0
# An honest peer passes these on: its clock or its list of coordinators differs from ours.
_NOT_HOSTILE = frozenset({"expired", "not_yet_valid", "wrong_signer"})

NewStream = Callable[[str, str], Awaitable[Libp2pStream]]


class Have(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The SHA-256 of each document that the asker keeps."""

    have: Annotated[
        tuple[Annotated[bytes, Meta(min_length=32, max_length=32)], ...],
        Meta(max_length=limits.NOTICES_KEPT_MAX),
    ] = ()


_HAVE = msgspec.json.Decoder(Have)


class NoticeExchange:
    """Publishes, accepts, asks for and answers notices. `heed` is called with each new one.

    `spread` gossips a document, `reached` tells whether gossip gets to a peer, `fault` counts what
    no honest peer does.
    """

    def __init__(
        self,
        host: Any,
        board: NoticeBoard,
        nursery: trio.Nursery,
        *,
        new_stream: NewStream,
        spread: Callable[[bytes], Awaitable[None]],
        unreached: Callable[[], list[Any]],
        heed: Callable[[Notice], None],
        fault: Callable[[str, str, object], None],
        saved: AdvertFile | None = None,
    ) -> None:
        self.board, self.feed = board, LatestFeed[Notice]()
        self._host, self._nursery, self._new_stream = host, nursery, new_stream
        self._spread, self._unreached = spread, unreached
        self._heed, self._fault, self._saved = heed, fault, saved
        self._written: tuple[bytes, ...] = ()
        self._asked_at: list[float] = []
        self._asks = TokenBuckets(
            per_s=limits.NOTICE_ASKS_PER_S_PER_PEER,
            burst=limits.NOTICE_ASKS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )

    async def start(self) -> None:
        """Heed what was known at the last stop, and answer newcomers."""
        if self._saved is not None:
            for data in await trio.to_thread.run_sync(self._saved.load):
                try:
                    self._take(data)
                except EnvelopeError as error:  # no longer of use
                    logger.debug("saved notice code=%s", error.code)
            self._nursery.start_soon(self._keep_saved)
        self._host.set_stream_handler(TProtocol(PROTOCOL), self._serve)

    async def stop(self) -> None:
        """Keep what is known for the next start."""
        await self._save(now=True)

    async def publish(self, data: bytes) -> None:
        """Heed a notice and gossip it. Raises EnvelopeError when an honest peer would refuse it."""
        if self._take(data) is None:
            await trio.lowlevel.checkpoint()
            return
        # A connection younger than a heartbeat is not in the mesh yet: those peers are told.
        for peer in self._unreached()[: 4 * limits.INDEX_PEERS_MAX]:
            self._nursery.start_soon(self._ask, peer, (data,))
        await self._spread(data)

    def judge(self, shard: int, forwarder: str, data: bytes) -> Judgement:
        """What becomes of a gossiped notice."""
        try:
            notice = self._take(data)
        except EnvelopeError as error:
            return Judgement.IGNORE if error.code in _NOT_HOSTILE else Judgement.REJECT
        return Judgement.IGNORE if notice is None else Judgement.PASS

    def greet(self, peer: Any) -> None:
        """A connection to a member is up: ask for what we may have missed."""
        now = trio.current_time()
        self._asked_at = [then for then in self._asked_at if now - then < _ASK_AGAIN_S]
        if len(self._asked_at) < _ASKED_MAX:
            self._asked_at.append(now)
            self._nursery.start_soon(self._ask, peer, ())

    def _take(self, data: bytes) -> Notice | None:
        notice = self.board.offer(data, time.time())
        if notice is not None:
            self.feed.tell(notice)
            self._heed(notice)
        return notice

    async def _ask(self, peer: Any, pushed: Sequence[bytes]) -> None:
        text = str(peer)
        news: list[bytes] = []
        try:
            stream = await self._new_stream(text, PROTOCOL)
            async with stream:
                with trio.fail_after(_EXCHANGE_S):
                    await stream.send_all(self._question(pushed))
                    news = await self._receive(stream, text, limits.NOTICES_KEPT_MAX)
        except EnvelopeError as error:
            self._broken(text, error)
        except trio.TooSlowError as error:
            strangers.note(text, "notices", error)
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("notices peer=%s error=%r", text, error)
        await self._pass_on(news)

    def _question(self, pushed: Sequence[bytes]) -> bytes:
        have = Have(tuple(map(_name, self.board.documents())))
        out = frames.encode(Kind.HEADER, msgspec.json.encode(have))
        out += b"".join(frames.encode(Kind.ENVELOPE, data) for data in pushed[:_PUSHED_MAX])
        return out + frames.encode(Kind.END)

    async def _serve(self, net_stream: Any) -> None:
        stream = Libp2pStream(net_stream, PROTOCOL, self._nursery)
        if not self._asks.take(stream.peer, trio.current_time()):
            strangers.note(stream.peer, "notices", "asks too often")
            await stream.reset()
            return
        news: list[bytes] = []
        try:
            with trio.fail_after(_EXCHANGE_S):
                reader = FrameReader(stream, size_max=_FRAME_MAX)
                have = set(_decode(await reader.expect(Kind.HEADER)).have)
                news = await self._receive(stream, stream.peer, _PUSHED_MAX, reader)
                for data in self.board.documents():
                    if _name(data) not in have and data not in news:
                        await stream.send_all(frames.encode(Kind.ENVELOPE, data))
                await stream.send_all(frames.encode(Kind.END))
            await stream.aclose()
        except EnvelopeError as error:
            self._broken(stream.peer, error)
            await stream.reset()
        except trio.TooSlowError as error:
            strangers.note(stream.peer, "notices", error)
            await stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.reset()
        await self._pass_on(news)

    async def _receive(
        self, stream: OverlayStream, peer: str, count_max: int, reader: FrameReader | None = None
    ) -> list[bytes]:
        """Take documents in until END; those that were news. Raises EnvelopeError."""
        reader = reader or FrameReader(stream, size_max=_FRAME_MAX)
        news: list[bytes] = []
        for _ in range(count_max + 1):
            frame = await reader.next()
            if frame is None:
                raise EnvelopeError("truncated", "The notices ended early.")
            if frame.kind == Kind.END:
                return news
            if frame.kind != Kind.ENVELOPE:
                break
            try:
                if self._take(frame.body) is not None:
                    news.append(frame.body)
            except EnvelopeError as error:
                report = strangers.note if error.code in _NOT_HOSTILE else self._fault
                report(peer, error.code, error.message)
        raise EnvelopeError("malformed", "The notices carry something else than was asked.")

    async def _pass_on(self, news: Sequence[bytes]) -> None:
        """Two parts of the network may have met here: the rest of ours has not heard it."""
        for data in news:
            await self._spread(data)

    def _broken(self, peer: str, error: EnvelopeError) -> None:
        """The peer broke the format; one whose process ended midway did nothing wrong."""
        if error.code == "truncated":
            strangers.note(peer, "notices", error)
        else:
            self._fault(peer, "notices", error)

    async def _keep_saved(self) -> None:
        while True:
            await trio.sleep(_SAVE_CHECK_S)
            await self._save()

    async def _save(self, *, now: bool = False) -> None:
        documents = self.board.documents()
        if self._saved is None or documents == self._written:
            return
        try:
            await trio.to_thread.run_sync(partial(self._saved.save, documents, now=now))
            self._written = documents
        except OSError as error:  # others know it too: a full disk must not stop the overlay
            logger.warning("notices not saved error=%r", error)


def _name(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _decode(body: bytes) -> Have:
    try:
        return _HAVE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EnvelopeError("malformed", "The notices' header is not understood.") from None
