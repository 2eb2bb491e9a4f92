"""One stream of a link, as the rest of Lumaris sees it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from lumaris_overlay.links.mux import LaneState, Mux
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol.keys import PeerId

_READ_BYTES = 256 * 1024


class Lane(OverlayStream):
    """A byte stream that shares the link's connection with other lanes."""

    def __init__(
        self,
        mux: Mux,
        state: LaneState,
        peer: PeerId,
        *,
        flush: Callable[[], None],
        on_close: Callable[[Lane], None],
    ) -> None:
        self.peer, self.protocol = peer, state.protocol
        self._mux, self._state = mux, state
        self._flush, self._on_close = flush, on_close
        self._closed = False
        self._sending = trio.StrictFIFOLock()
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        state.on_readable = self._wake_readers
        state.on_writable = self._wake_writers

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting while the peer does not read."""
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data).cast("B")
        if self._sending.locked() or len(view) > self._mux.room(self._state):
            async with self._sending:
                while True:
                    taken = self._write(view)
                    view = view[taken:]
                    if not view:
                        break
                    if not taken:
                        await self._writers.park()
        else:
            with self._mux.corked():
                self._write(view)
            self._flush()  # at once: the writer's turn would come one pass of the scheduler later
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Until there is room, or no hope of it."""
        await trio.lowlevel.checkpoint()
        while self._mux.room(self._state) == 0 and not self._hopeless:
            await self._writers.park()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._sending:
            if self._closed:
                raise trio.ClosedResourceError("the stream was closed")
            self._mux.finish(self._state)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes, or b"" at the peer's end of stream."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            if self._closed:
                raise trio.ClosedResourceError("the stream was closed")
            data = self._mux.read(self._state, max_bytes or _READ_BYTES)
            if data or self._state.ended:
                break
            if self._state.broken:
                raise trio.BrokenResourceError("the connection to the peer was lost")
            await self._readers.park()
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        self._end(self._mux.close)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Break both directions at once."""
        self._end(self._mux.reset)
        await trio.lowlevel.cancel_shielded_checkpoint()

    @property
    def _hopeless(self) -> bool:
        state = self._state
        return self._closed or state.broken or state.deaf or state.finished

    def _write(self, view: memoryview) -> int:
        if self._closed or self._state.finished:
            raise trio.ClosedResourceError("the sending side was closed")
        if self._state.broken or self._state.deaf:
            raise trio.BrokenResourceError("the connection to the peer was lost")
        return self._mux.write(self._state, view)

    def _end(self, how: Callable[[LaneState], None]) -> None:
        if self._closed:
            return
        self._closed = True
        how(self._state)
        self._wake_readers()
        self._wake_writers()
        self._on_close(self)

    def _wake_readers(self) -> None:
        self._readers.unpark_all()

    def _wake_writers(self) -> None:
        self._writers.unpark_all()
