"""Whose transfer is served next: some at once, shared between peers, the others wait a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from lumaris_overlay.bulk import wire as wires
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import BULK_TRANSFERS_MAX

_PER_PEER_MAX = 16  # each holds a thread and a few MiB
# One that waits is a task and a lane: some kB.
_WAITING_PER_PEER_MAX = 64
_WAITING_MAX = 1024
# Of a stall: the peer must hear from us before it gives us up.
_WAIT_STALLS = 2 / 3


class _Waiter:
    def __init__(self, peer: str) -> None:
        self.peer, self.turn = peer, trio.Event()


class Turns:
    """The turns of all peers."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def turn(self, peer: str) -> AsyncGenerator[None]:
        """One transfer of a peer. Raises RefusedError `busy` when it has to wait too long."""
        waiter = _Waiter(peer)
        try:
            self._queue(waiter)
            with trio.move_on_after(_WAIT_STALLS * wires.STALL_S):
                await waiter.turn.wait()
            if not waiter.turn.is_set():
                raise RefusedError("busy", "Too many transfers at once.")
            yield
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.turn.is_set():
                self._running[peer] -= 1
                if not self._running[peer]:
                    del self._running[peer]
                self._admit()

    def _queue(self, waiter: _Waiter) -> None:
        of_peer = sum(other.peer == waiter.peer for other in self._waiting)
        if of_peer >= _WAITING_PER_PEER_MAX or len(self._waiting) >= _WAITING_MAX:
            raise RefusedError("busy", "Too many transfers at once.")
        self._waiting.append(waiter)
        self._admit()

    def _admit(self) -> None:
        """Let in whoever may; of those the peer that has the fewest, then who came first."""
        while self._waiting:
            waiter = min(self._waiting, key=lambda found: self._running[found.peer])
            # No peer has more than what is still free: a few peers never hold all there is.
            free = BULK_TRANSFERS_MAX - self._running.total()
            if self._running[waiter.peer] >= min(_PER_PEER_MAX, free):
                return
            self._waiting.remove(waiter)
            self._running[waiter.peer] += 1
            waiter.turn.set()
