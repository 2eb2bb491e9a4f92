"""Frames over a byte stream, for the protocols peers speak."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import trio

from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol import codes, frames
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Frame, Kind
from lumaris_protocol.limits import REASON_CHARS_MAX

H = TypeVar("H")

_REFUSE_S = 2  # telling a stranger no must not hold us up


class _Refusal(msgspec.Struct, frozen=True):
    code: str
    message: str = ""
    hint: str = ""
    money_moved: bool = False


class FramedStream:
    """Sends and receives whole frames. One task receives; any number may send."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._reader = FrameReader(stream)
        self._sending = trio.StrictFIFOLock()
        self._torn = False  # a send ended early: what follows would be read as the rest of it

    async def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send one frame. Raises trio.BrokenResourceError when the other side is gone."""
        await self.send_encoded(frames.encode(kind, body))

    async def send_encoded(self, data: bytes) -> None:
        """Send frames that are already encoded, several at a time for speed."""
        async with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._torn:
                raise trio.BrokenResourceError("an earlier frame was cut off")
            self._torn = True
            await self.stream.send_all(data)
            self._torn = False

    async def receive(self) -> Frame | None:
        """The next frame, or None at the end of the stream. Raises EnvelopeError for bad frames."""
        return await self._reader.next()

    async def expect(self, kind: Kind) -> bytes:
        """The body of the next frame, which must be of `kind`.

        Raises the RefusedError that the other side sent, or EnvelopeError `truncated`/`malformed`.
        """
        frame = await self.receive()
        if frame is None:
            raise EnvelopeError("truncated", "The other side ended the stream.")
        if frame.kind == Kind.REFUSAL:
            raise read_refusal(frame.body)
        if frame.kind != kind:
            raise EnvelopeError("malformed", f"A frame of kind {frame.kind.name} came instead.")
        return frame.body

    async def expect_header(self, kind: type[H]) -> H:
        """A HEADER frame decoded as `kind`. Raises as `expect` does."""
        body = await self.expect(Kind.HEADER)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EnvelopeError("malformed", f"A bad header: {error}") from None

    async def refuse(self, error: LumarisError) -> None:
        """Say why not, as far as the other side still listens.

        After a frame that was cut off nothing can be said: the stream breaks instead.
        """
        with trio.move_on_after(_REFUSE_S):
            try:
                await self.send(Kind.REFUSAL, encode_refusal(error))
                await self.stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                pass
        if self._torn and isinstance(self.stream, OverlayStream):
            await self.stream.reset()

    async def aclose(self) -> None:
        """Close the stream."""
        await self.stream.aclose()


def encode_refusal(error: LumarisError) -> bytes:
    """The body of a REFUSAL frame."""
    refusal = _Refusal(
        error.code,
        error.message[:REASON_CHARS_MAX],
        error.hint[:REASON_CHARS_MAX],
        error.money_moved,
    )
    return msgspec.json.encode(refusal)


def read_refusal(body: bytes) -> LumarisError:
    """The other side's no. A code we do not know is `internal`; its text is never trusted long."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return EnvelopeError("malformed", "The other side refused without a readable reason.")
    code = refusal.code if refusal.code in codes.CODES else "internal"
    return RefusedError(
        code,
        refusal.message[:REASON_CHARS_MAX],
        hint=refusal.hint[:REASON_CHARS_MAX],
        money_moved=refusal.money_moved,
    )
