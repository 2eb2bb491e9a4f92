"""What one session still has to store and to send, in the order its machine decided it.

Storing and sending are slow and deciding is not; the outbox keeps the two apart without letting
them change places. Consecutive sends leave in one write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol import frames
from lumaris_protocol.effects import Effect, Send
from lumaris_protocol.frames import Kind

# Bulk output waits while this many messages are queued: a slow reader slows its own job only.
_LOG_WAIT = 64

Keeper = Callable[[Effect], Awaitable[None]]


class Outbox:
    """The queue of one session."""

    def __init__(self, stream: FramedStream, keep: Keeper) -> None:
        self._stream, self._keep = stream, keep
        self._queue: deque[Effect] = deque()
        self._filled = trio.Event()
        self._drained = trio.Event()
        self._busy = False
        self._dead = False  # nothing more will be sent

    def put(self, effect: Effect) -> None:
        """Queue an effect; never blocks."""
        self._queue.append(effect)
        self._filled.set()

    async def room(self) -> None:
        """Wait until the queue is short enough for bulk output."""
        while len(self._queue) >= _LOG_WAIT and not self._dead:
            await self._next_drain()

    async def flush(self) -> None:
        """Wait until everything queued was stored and sent, or nothing more can be."""
        while (self._queue or self._busy) and not self._dead:
            await self._next_drain()

    async def keep_rest(self) -> None:
        """The peer is gone: store what must be stored and drop what was to be sent."""
        for effect in self._queue:
            if not isinstance(effect, Send):
                await self._keep(effect)
        self._queue.clear()

    async def run(self) -> None:
        """Carry out the queue. Raises trio.BrokenResourceError when the peer is gone."""
        try:
            while True:
                await self._filled.wait()
                self._filled = trio.Event()
                while self._queue:
                    self._busy = True
                    await self._work()
                self._busy = False
                self._wake()
        finally:
            self._dead = True
            self._wake()

    async def _work(self) -> None:
        batch = bytearray()
        while self._queue and isinstance(self._queue[0], Send):
            sending = self._queue.popleft()
            assert isinstance(sending, Send)
            batch += frames.encode(Kind.ENVELOPE, sending.data)
        if batch:
            await self._stream.send_encoded(bytes(batch))
            self._wake()
        else:
            # Taken off only when it is stored: a cancelled write is made up for by `keep_rest`.
            await self._keep(self._queue[0])
            self._queue.popleft()

    def _wake(self) -> None:
        self._drained.set()
        self._drained = trio.Event()

    async def _next_drain(self) -> None:
        await self._drained.wait()
