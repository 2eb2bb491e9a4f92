"""One peer stream seen through the overlay's socket: the raw pipe, and how it ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import shielded
from lumaris_protocol.keys import PeerId

_READ_BYTES = 256 * 1024
_RESET_S = 1.0

AskId = Callable[[int], Awaitable[bool]]
TellId = Callable[[int], Awaitable[None]]


class PipeStream(OverlayStream):
    """A stream to a peer whose bytes pass through the overlay process."""

    def __init__(
        self,
        pipe: trio.SocketStream,
        peer: str,
        protocol: str,
        *,
        number: int,
        ended_clean: AskId,
        reset: TellId,
    ) -> None:
        self.peer = PeerId(peer)
        self.protocol = protocol
        self._pipe = pipe
        self._number = number
        self._ended_clean = ended_clean
        self._reset = reset
        self._eof_seen = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting while the peer does not read."""
        await self._pipe.send_all(memoryview(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Until there is room in the pipe."""
        await self._pipe.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes."""
        await self._pipe.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes, or b"" at the peer's end of stream."""
        data = bytes(await self._pipe.receive_some(max_bytes or _READ_BYTES))
        if not data and not self._eof_seen:
            if not await self._ended_clean(self._number):
                raise trio.BrokenResourceError("the connection to the peer was lost")
            self._eof_seen = True
        return data

    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        await self._pipe.aclose()

    async def reset(self) -> None:
        """Break both directions at once."""
        with shielded(_RESET_S):
            await self._reset(self._number)
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._pipe)
