"""A byte stream between two simulated hosts."""

from __future__ import annotations

import trio

from lumaris_overlay.ports import OverlayStream
from lumaris_protocol.keys import PeerId

# As the muxer's window: a writer waits once this much is unread.
_WINDOW_BYTES = 256 * 1024
_PIECE_BYTES = 64 * 1024


class _Pipe:
    """One direction: a bounded buffer and what became of it."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ended = False  # the writer said that nothing more comes
        self.deaf = False  # the reader closed: what is written now breaks the writer
        self.broken = False
        self._changed = trio.Event()

    def change(self) -> None:
        """Wake whoever waits on this direction."""
        self._changed.set()

    async def wait(self) -> None:
        """Until something about this direction changes."""
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()


class SimulatedStream(OverlayStream):
    """One end of a simulated stream."""

    def __init__(self, peer: PeerId, protocol: str, outward: _Pipe, inward: _Pipe) -> None:
        self.peer, self.protocol = peer, protocol
        self._outward, self._inward = outward, inward
        self._closed = False
        self._send_guard = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting while the peer does not read."""
        await trio.lowlevel.checkpoint()
        if self._closed or self._outward.ended:
            raise trio.ClosedResourceError("the sending side was closed")
        view = memoryview(data)
        async with self._send_guard:
            while True:
                if self._outward.broken or self._outward.deaf:
                    raise trio.BrokenResourceError("the connection to the peer was lost")
                if not view:
                    return
                if len(self._outward.buffer) >= _WINDOW_BYTES:
                    await self._outward.wait()
                    continue
                piece, view = view[:_PIECE_BYTES], view[_PIECE_BYTES:]
                self._outward.buffer += piece
                self._outward.change()

    async def wait_send_all_might_not_block(self) -> None:
        """Until there is room, or no hope of it."""
        await trio.lowlevel.checkpoint()
        while len(self._outward.buffer) >= _WINDOW_BYTES and not (
            self._outward.broken or self._outward.deaf
        ):
            await self._outward.wait()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes."""
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("the stream was closed")
        self._outward.ended = True
        self._outward.change()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes, or b"" at the peer's end of stream."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("the stream was closed")
            if self._inward.broken:
                raise trio.BrokenResourceError("the connection to the peer was lost")
            if self._inward.buffer:
                size = max_bytes or _PIECE_BYTES
                data = bytes(self._inward.buffer[:size])
                del self._inward.buffer[:size]
                self._inward.change()
                return data
            if self._inward.ended:
                return b""
            await self._inward.wait()

    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        self._closed = True
        self._outward.ended = self._inward.deaf = True
        self._outward.change()
        self._inward.change()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Break both ends at once."""
        self.lose()

    def lose(self) -> None:
        """What happens to both ends when the connection is lost."""
        for pipe in (self._outward, self._inward):
            pipe.broken = True
            pipe.change()


def stream_pair(
    opener: PeerId, server: PeerId, protocol: str
) -> tuple[SimulatedStream, SimulatedStream]:
    """The two ends of a new stream: the opener's, then the server's."""
    there, back = _Pipe(), _Pipe()
    near = SimulatedStream(server, protocol, there, back)
    return near, SimulatedStream(opener, protocol, back, there)
