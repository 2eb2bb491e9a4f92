"""One connection of a link: a stream inside the overlay, or TLS between the programs."""

from __future__ import annotations

import trio

from lumaris_overlay.links.tls import TlsStream
from lumaris_overlay.links.wire import Decoder, Frame
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import shielded

READ_BYTES = 256 * 1024
_DROP_S = 1.0

# What a lost connection looks like, on either kind of stream.
LOST = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class Carrier:
    """Frames over a stream. One task reads, one writes."""

    def __init__(self, stream: trio.abc.Stream, *, direct: bool) -> None:
        self.stream, self.direct = stream, direct
        self.address: tuple[str, int] | None = None  # where we dialled, when we did
        self.dropped = trio.Event()
        self._decoder = Decoder()
        self._ready: list[Frame] = []

    async def send(self, data: bytes) -> None:
        """Send bytes. Raises one of `LOST`."""
        await self.stream.send_all(data)

    @property
    def has_rest(self) -> bool:
        """Whether `send_now` left something, which the next `send` sends first."""
        return isinstance(self.stream, TlsStream) and self.stream.has_rest

    def send_now(self, data: bytes) -> bool:
        """Send without waiting; False when something is left.

        Only for direct connections, and only while nobody is in `send`.
        """
        assert isinstance(self.stream, TlsStream), "a stream of the overlay has to be waited for"
        return self.stream.send_now(data)

    async def frames(self) -> list[Frame]:
        """The next frames; none at the end of the stream. Raises one of `LOST`, EnvelopeError."""
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        while True:
            data = await self.stream.receive_some(READ_BYTES)
            if not data:
                return []
            frames = self._decoder.feed(data)
            if frames:
                return frames

    async def frame(self) -> Frame:
        """The next frame alone. Raises one of `LOST`, EnvelopeError."""
        frames = await self.frames()
        if not frames:
            raise trio.BrokenResourceError("the connection ended")
        self._ready = frames[1:]
        return frames[0]

    async def drop(self) -> None:
        """Give the connection up at once. Never raises."""
        if self.dropped.is_set():
            return
        self.dropped.set()
        with shielded(_DROP_S):
            if isinstance(self.stream, OverlayStream):
                await self.stream.reset()
            else:
                await trio.aclose_forcefully(self.stream)
