"""Frames over a byte stream, read one at a time with a deadline set by the caller."""

from __future__ import annotations

import trio

from lumaris_protocol import frames
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import FRAME_BYTES_MAX

_READ_BYTES = 64 * 1024


class FrameReader:
    """Takes frames off a stream. Raises EnvelopeError for what is not one."""

    def __init__(self, stream: trio.abc.ReceiveStream, *, size_max: int = FRAME_BYTES_MAX) -> None:
        self._stream = stream
        self._decoder = frames.Decoder(size_max=size_max)
        self._ready: list[frames.Frame] = []

    async def next(self) -> frames.Frame | None:
        """The next frame, or None at a clean end of stream."""
        while not self._ready:
            data = await self._stream.receive_some(_READ_BYTES)
            if not data:
                self._decoder.finish()
                return None
            self._ready = self._decoder.feed(bytes(data))[::-1]
        return self._ready.pop()

    async def expect(self, kind: frames.Kind) -> bytes:
        """The body of a frame that must come now and be of `kind`."""
        frame = await self.next()
        if frame is None:
            raise EnvelopeError("truncated", "The stream ended before an answer came.")
        if frame.kind != kind:
            raise EnvelopeError("malformed", f"A {kind.name} frame was expected.")
        return frame.body
