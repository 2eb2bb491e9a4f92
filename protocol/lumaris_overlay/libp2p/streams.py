"""A libp2p stream behind the port's stream interface."""

from __future__ import annotations

from typing import Any

import trio
from libp2p.network.stream.exceptions import StreamEOF

from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import shielded
from lumaris_protocol.keys import PeerId

_READ_BYTES = 256 * 1024
# Large writes amortise the muxer's cost per call; the muxer cuts them into its frames.
_WRITE_BYTES = 1024 * 1024
_CLOSE_S = 1.0
# After our close the peer may still be sending: read it away for a while, then reset.
_LINGER_S = 5.0
_LINGER_BYTES = 4 * 1024 * 1024


class Libp2pStream(OverlayStream):
    """One end of a muxed stream over an authenticated connection."""

    def __init__(self, stream: Any, protocol: str, nursery: trio.Nursery) -> None:
        self.peer = PeerId(str(stream.muxed_conn.peer_id))
        self.protocol = protocol
        self._stream = stream
        self._muxed = stream.muxed_stream
        self._nursery = nursery
        self._closed = False
        self._eof_sent = False
        self._eof_seen = False
        self._sending = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting while the peer does not read."""
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the sending side was closed")
        view = memoryview(data)
        async with self._sending:
            for start in range(0, len(view), _WRITE_BYTES):
                try:
                    await self._stream.write(bytes(view[start : start + _WRITE_BYTES]))
                except trio.Cancelled:
                    raise
                except Exception as error:
                    raise trio.BrokenResourceError("the stream broke while sending") from error

    async def wait_send_all_might_not_block(self) -> None:
        """Nothing to wait for: a write waits itself."""
        self._check_open()
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes."""
        self._check_open()
        if self._eof_sent:
            await trio.lowlevel.checkpoint()
            return
        async with self._sending:
            self._eof_sent = True
            try:
                await self._muxed.close()
            except Exception as error:
                raise trio.BrokenResourceError("the stream broke while closing") from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes, or b"" at the peer's end of stream."""
        self._check_open()
        if self._eof_seen:
            await trio.lowlevel.checkpoint()
            return b""
        try:
            data: bytes = await self._stream.read(max_bytes or _READ_BYTES)
        except StreamEOF:
            self._check_open()
            # libp2p reports a lost connection as an end of stream too.
            if self._muxed.reset_received or (
                self._muxed.conn.event_shutting_down.is_set() and not self._muxed.recv_closed
            ):
                raise trio.BrokenResourceError("the connection to the peer was lost") from None
            self._eof_seen = True
            return b""
        except Exception as error:
            self._check_open()
            raise trio.BrokenResourceError("the stream was reset by the peer") from error
        return data

    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        with shielded(_CLOSE_S):
            try:
                await self._muxed.close()
            except Exception:
                await self._stream.reset()
        self._nursery.start_soon(self._linger)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Break both directions at once."""
        self._closed = True
        with shielded(_CLOSE_S):
            await self._stream.reset()

    async def _linger(self) -> None:
        rest = _LINGER_BYTES
        try:
            with trio.move_on_after(_LINGER_S):
                while rest > 0:
                    rest -= len(await self._stream.read(_READ_BYTES))
        except Exception:  # noqa: S110 - ended or broken: both are the end we wait for
            pass
        with shielded(_CLOSE_S):
            if self._muxed.recv_closed:
                await self._stream.remove()
            else:
                await self._stream.reset()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the stream was closed")
