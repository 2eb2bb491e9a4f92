"""What one session still has to store and to send, without ever waiting for either.

Storing and sending are slow and deciding is not. A message waits for everything that was to be
stored before it, for it may speak of that; what is to be stored waits for no message, so that a
peer that does not read keeps nothing off our disk. Consecutive sends leave in one write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol import frames
from lumaris_protocol.effects import Effect, Send
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import FRAME_BYTES_MAX

# Bulk output waits while this many effects are queued: a slow reader slows its own job only.
_LOG_WAIT = 64
# A peer that does not take one write in this time is gone, or wants to fill our memory. With the
# bound on a write it is a peer slower than 9 kB/s.
_STALL_S = 30
_WRITE_BYTES_MAX = FRAME_BYTES_MAX

Keeper = Callable[[Effect], Awaitable[None]]


class Outbox:
    """The queues of one session."""

    def __init__(self, stream: FramedStream, keep: Keeper) -> None:
        self._stream, self._keep = stream, keep
        self._sends: deque[tuple[int, Send]] = deque()  # with how many keeps must come before
        self._keeps: deque[Effect] = deque()
        self._put_count = self._kept_count = 0
        # Who waits: to store, to send, and for less to be queued.
        self._keeper = trio.lowlevel.ParkingLot()
        self._sender = trio.lowlevel.ParkingLot()
        self._waiters = trio.lowlevel.ParkingLot()
        self._sending = False
        self._dead = False  # nothing more will be sent

    def put(self, effect: Effect) -> None:
        """Queue an effect; never blocks."""
        if isinstance(effect, Send):
            self._sends.append((self._put_count, effect))
            self._sender.unpark_all()
        else:
            self._keeps.append(effect)
            self._put_count += 1
            self._keeper.unpark_all()

    @property
    def waiting(self) -> int:
        """Effects that were neither stored nor sent yet."""
        return len(self._sends) + len(self._keeps)

    async def room(self) -> None:
        """Wait until the queues are short enough for bulk output, or for another message."""
        while self.waiting >= _LOG_WAIT and not self._dead:
            await self._waiters.park()

    async def flush(self) -> None:
        """Wait until everything queued was stored and sent, or nothing more can be."""
        while (self.waiting or self._sending) and not self._dead:
            await self._waiters.park()

    async def keep_rest(self) -> None:
        """The peer is gone: store what must be stored and drop what was to be sent."""
        self._sends.clear()
        while self._keeps:
            await self._keep_next()

    async def run(self) -> None:
        """Carry out the queues.

        Raises trio.BrokenResourceError when the peer is gone or takes nothing; what storing raises
        comes in an ExceptionGroup.
        """
        lost: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_all)
                try:
                    await self._send_all()
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    lost = error
                    nursery.cancel_scope.cancel()
        finally:
            self._dead = True
            self._waiters.unpark_all()
        if lost is not None:
            raise lost

    async def _keep_all(self) -> None:
        while True:
            while self._keeps:
                await self._keep_next()
            await self._keeper.park()

    async def _keep_next(self) -> None:
        # Taken off only when it is stored: a cancelled write is made up for by `keep_rest`.
        await self._keep(self._keeps[0])
        self._keeps.popleft()
        self._kept_count += 1
        self._sender.unpark_all()
        self._waiters.unpark_all()

    async def _send_all(self) -> None:
        while True:
            batch = self._take_batch()
            if batch:
                self._sending = True
                with trio.move_on_after(_STALL_S) as scope:
                    await self._stream.send_encoded(batch)
                if scope.cancelled_caught:
                    raise trio.BrokenResourceError("The other side takes nothing.")
                self._sending = False
                self._waiters.unpark_all()
            else:
                await self._sender.park()
                # What others have to say in this turn of the scheduler leaves in the same write.
                await trio.lowlevel.checkpoint()

    def _take_batch(self) -> bytes:
        batch = bytearray()
        while self._sends and len(batch) < _WRITE_BYTES_MAX:
            keeps_before, effect = self._sends[0]
            if keeps_before > self._kept_count:
                break
            self._sends.popleft()
            batch += frames.encode(Kind.ENVELOPE, effect.data)
        return bytes(batch)
