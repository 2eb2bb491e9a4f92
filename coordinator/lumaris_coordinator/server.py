"""Uvicorn as this program needs it: it announces itself, ends in order, and waits for no one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from lumaris_coordinator.bounds import HEAD_S_MAX

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HttpProtocol


class Protocol(HttpProtocol):
    """Closes a connection on which no whole request head arrives in time.

    Uvicorn ends a connection that idles after an answer, but not one that never asks or asks a
    byte at a time; some hundred of those would take every slot.
    """

    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look_again(self) -> None:
        self._watch = self.loop.call_later(HEAD_S_MAX, self._look, self.cycle)

    def _look(self, before: object) -> None:
        cycle: Any = self.cycle
        unchanged = cycle is before
        if unchanged and (cycle is None or cycle.response_complete):
            self.transport.close()
            return
        self._look_again()


class Server(uvicorn.Server):
    """Prints `ready` once it listens, and returns on a signal where the original dies of it: the
    store is closed after the server."""

    def __init__(self, config: uvicorn.Config, *, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with the line that whoever started us waits for."""
        await super().startup(sockets=sockets)
        if self.started:
            print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the server, and nothing else."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
