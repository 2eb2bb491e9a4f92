"""The asking side of `/lumaris/blob/1`: one lane, its header and its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec
import trio

from lumaris_overlay.bulk import wire as wires
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.threads import dial
from lumaris_overlay.bulk.wire import DIGEST_BYTES, Cut, Wire
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.links.target import DirectTarget
from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_protocol.errors import EnvelopeError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import CHUNK_BYTES
from lumaris_protocol.protocols import BLOB, CONTENT, BlobHeader, BlobReply, ContentHeader

# A handshake costs as much as a few hundred KiB on a lane.
_DIRECT_BYTES_MIN = CHUNK_BYTES
RETRIES = 3  # in a row, without a chunk of progress
# A direct connection that is made and then fails this often in a row gives way to the lane.
DIRECT_TRIES = 2
_PAUSES_S = (0.1, 0.3, 1.0)
_LAST_WORD_S = 1.0
# A peer that is busy is asked again for so long: it has other files to move, and will have done.
_BUSY_S = 60.0
_BUSY_PAUSES_S = (0.2, 1.0, 3.0, 5.0)
# Refusals after which the same question may get another answer.
RETRY_CODES = frozenset({"busy"})


@dataclass(frozen=True)
class Source:
    """A peer in an open session with us that has a file, or wants one.

    Without a session it is another seller, that has the file among its images.
    """

    overlay: Overlay
    peer: str
    session: str = ""

    @property
    def protocol(self) -> str:
        """What it is asked by."""
        return BLOB if self.session else CONTENT

    def encode(self, header: BlobHeader) -> bytes:
        """The question, as the protocol has it."""
        if self.session:
            return msgspec.json.encode(header)
        return msgspec.json.encode(
            ContentHeader(
                op="get",
                digest=header.sha256,
                size_bytes=header.size_bytes,
                direct=header.direct,
                listed=header.listed,
            )
        )


class Exchange:
    """A lane whose header was answered."""

    def __init__(self, stream: FramedStream, reply: BlobReply) -> None:
        self.stream, self.reply = stream, reply

    @property
    def direct(self) -> DirectTarget | None:
        """Where the peer takes a bulk connection for this."""
        raw = self.stream.stream
        return raw.direct if isinstance(raw, OverlayStream) and self.reply.token else None

    async def dial(self, rate: Rate | None) -> Wire | None:
        """The bulk connection, or None where the lane must do."""
        target, token = self.direct, self.reply.token
        if target is None or token is None:
            return None
        try:
            return await dial(target, token, rate=rate)
        except Cut:
            return None

    async def receive_list(self, count: int) -> bytes:
        """The chunk list that was asked for. Raises RemoteError."""
        with answer_in_time():
            found = await self.stream.expect(Kind.DATA)
        if len(found) != DIGEST_BYTES * count:
            raise EnvelopeError("malformed", "A chunk list of another length.")
        return found

    async def raise_last_word(self) -> None:
        """After a cut: the peer may have said why. Raises its refusal if so."""
        with trio.move_on_after(_LAST_WORD_S):
            try:
                frame = await self.stream.receive()
            except (EnvelopeError, trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if frame is not None and frame.kind == Kind.REFUSAL:
                raise read_refusal(frame.body)


@asynccontextmanager
async def ask(
    source: Source, header: BlobHeader, *, direct: bool = False
) -> AsyncGenerator[Exchange]:
    """Open a lane, send the header and read the answer. Raises RemoteError, or Cut.

    `direct` asks for a connection beside the lane, where the peer can be dialled.
    """
    inner = await source.overlay.open_stream(source.peer, source.protocol)
    stream = FramedStream(inner)
    try:
        if direct and inner.direct is not None and header.size_bytes >= _DIRECT_BYTES_MIN:
            header = msgspec.structs.replace(header, direct=True)
        await stream.send(Kind.HEADER, source.encode(header))
        yield Exchange(stream, await read_reply(stream))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Cut(str(error)) from None
    except EnvelopeError as error:
        if error.code != "truncated":
            raise
        raise Cut(error.message) from None
    finally:
        await stream.aclose()


async def read_reply(stream: FramedStream) -> BlobReply:
    """The peer's next answer. Raises RemoteError."""
    with answer_in_time():
        return await stream.expect_header(BlobReply)


@contextmanager
def answer_in_time() -> Iterator[None]:
    """Fails as RefusedError `unreachable` when the body takes longer than a stall."""
    try:
        with trio.fail_after(wires.STALL_S):
            yield
    except trio.TooSlowError:
        raise RefusedError("unreachable", "The peer does not answer a transfer.") from None


class Patience:
    """With one peer that is busy, or several times so in a row."""

    def __init__(self) -> None:
        self._tries, self._until = 0, trio.current_time() + _BUSY_S

    async def wait(self) -> bool:
        """Wait before asking again; False when that was done long enough."""
        if trio.current_time() >= self._until:
            return False
        await trio.sleep(_BUSY_PAUSES_S[min(self._tries, len(_BUSY_PAUSES_S) - 1)])
        self._tries += 1
        return True


async def pause(tries: int) -> None:
    """Wait before the next try, longer each time."""
    await trio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S)) - 1])
