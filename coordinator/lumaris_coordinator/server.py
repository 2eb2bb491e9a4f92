"""Uvicorn as this program needs it: it announces itself, ends in order, and waits for no one.

What it would refuse in plain text, or not at all, is refused with a problem document here: a head
that cannot be parsed (400) or is too large (431), and connections beyond the bound (503).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lumaris_coordinator import problems
from lumaris_coordinator.bounds import (
    CONNECTIONS_PER_ADDRESS_MAX,
    HEAD_BYTES_MAX,
    HEAD_S_MAX,
    LOCAL_CONNECTIONS_KEPT,
    TAKEN_S_MAX,
    TLS_HANDSHAKE_S_MAX,
)
from lumaris_coordinator.limits.middleware import counted_as, plain_address
from lumaris_coordinator.tls import state_of
from lumaris_protocol.errors import LumarisError


class Protocol(HttpToolsProtocol):
    """Closes a connection on which no whole request head arrives in time, or from which nothing of
    the answers is taken, and bounds heads.

    Uvicorn ends a connection that idles after an answer, but not one that never asks, asks a byte
    at a time or never reads; some hundred of those would take every slot. Its parser has no limit
    of a head's size.
    """

    # Reverse proxies, behind which are many.
    proxies: frozenset[str] = frozenset()
    _watch: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _full_since: float | None = None
    _head_bytes = 0
    _fed_bytes = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        # Counted here and not by uvicorn, which would answer in plain text.
        self._connections_max, self.limit_concurrency = self.limit_concurrency, None
        self.app_state = {**self.app_state, **state_of(transport)}
        self._look_again()
        self._look_at_unsent(0)
        self._crowd = self._crowded()
        if self._crowd is not None:
            self._refuse_raw(_refused(self._crowd))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        for watch in (self._watch, self._taking):
            if watch is not None:
                watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless a head goes on for longer than it may."""
        if self._crowd is not None:
            return
        # The parser tells of a field once it is whole: one that never is must be counted here.
        if self._in_head:
            self._fed_bytes += len(data)
        super().data_received(data)
        if self._in_head and max(self._fed_bytes, self._head_bytes) > HEAD_BYTES_MAX:
            self._refuse_raw(_head_too_large())
        elif not self._in_head and self._head_bytes > HEAD_BYTES_MAX and self.cycle.more_body:
            self.transport.close()  # they were the trailers of a body

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_bytes, self._fed_bytes, self._in_head = 0, 0, True

    def on_url(self, url: bytes) -> None:
        """Some of the target."""
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or of the trailers of a body."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes <= HEAD_BYTES_MAX:  # what is too much is counted and not kept
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Choose who answers: the app, or a refusal."""
        self._in_head = False
        served = self.app
        refused = self._refusal()
        if refused is not None:
            self.app = _refusing(refused)
        try:
            super().on_headers_complete()
        finally:
            self.app = served

    def _crowded(self) -> LumarisError | None:
        """Why this connection is one too many of its address: one address must leave places to the
        others, and all strangers some to this machine itself, which asks whether we live."""
        address = _address_of(self)
        group = counted_as(address)
        if group is None or address in self.proxies:
            return None
        most = self._connections_max
        if most is not None and len(self.connections) > most - LOCAL_CONNECTIONS_KEPT:
            return LumarisError("busy", "All connections are taken.")
        same = sum(counted_as(_address_of(one)) == group for one in self.connections)
        if same > CONNECTIONS_PER_ADDRESS_MAX:
            return LumarisError(
                "too_many",
                f"An address may hold {CONNECTIONS_PER_ADDRESS_MAX} connections.",
                hint="If it is a reverse proxy, name it in the setting `proxies`.",
            )
        return None

    def _refusal(self) -> Response | None:
        if self._head_bytes > HEAD_BYTES_MAX:
            return _head_too_large()
        if self._connections_max is not None and (
            max(len(self.connections), len(self.tasks)) > self._connections_max
        ):
            return _refused(LumarisError("busy", "All connections are taken."))
        return None

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over, if it may be one more: it is watched no longer."""
        refused = self._refusal()
        if refused is not None:
            self._refuse_raw(refused)
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed."""
        self._refuse_raw(_refused(LumarisError("malformed", "That is no HTTP/1.1 request.")))

    def _refuse_raw(self, response: Response) -> None:
        """Answer past the parser, and close."""
        if self.transport.is_closing():
            return
        head = [b"HTTP/1.1 %d \r\n" % response.status_code]
        head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        body = bytes(response.body)
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", body]))
        self.transport.close()

    def _look_again(self) -> None:
        self._watch = self.loop.call_later(HEAD_S_MAX, self._look, self.cycle)

    def _look(self, before: object) -> None:
        cycle: Any = self.cycle
        unchanged = cycle is before
        if unchanged and (cycle is None or cycle.response_complete):
            self.transport.close()
            return
        self._look_again()

    def pause_writing(self) -> None:
        """More waits to be sent than is kept in memory."""
        super().pause_writing()
        self._full_since = self.loop.time()

    def resume_writing(self) -> None:
        """Most of it was taken."""
        super().resume_writing()
        self._full_since = None

    def _look_at_unsent(self, before: int) -> None:
        """End a connection whose buffer has been full since the last time, or where as much waits
        to be sent as then. Also one that is closed already, or was handed over as a WebSocket: both
        would wait for their last byte to go."""
        unsent, now = self.transport.get_write_buffer_size(), self.loop.time()
        full = self._full_since is not None and now - self._full_since >= TAKEN_S_MAX
        if full or (unsent and unsent == before):
            self.transport.abort()
        elif unsent or not self.transport.is_closing():
            self._taking = self.loop.call_later(TAKEN_S_MAX, self._look_at_unsent, unsent)


def _address_of(connection: object) -> str:
    client = getattr(connection, "client", None)
    return plain_address(client[0]) if client else ""


def protocol_behind(proxies: Iterable[str]) -> type[Protocol]:
    """The protocol for a server behind these reverse proxies."""
    named = frozenset(map(plain_address, proxies))
    return type("Protocol", (Protocol,), {"proxies": named})


class _OfStrangers(logging.Filter):
    """Drops the line that uvicorn writes for every connection that speaks no HTTP: a stranger makes
    as many of them as it likes."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.module != "httptools_impl" or record.levelno > logging.WARNING


_OF_STRANGERS = _OfStrangers()


class Server(uvicorn.Server):
    """Prints `ready` once it listens, and returns on a signal where the original dies of it: the
    store is closed after the server."""

    def __init__(
        self, config: uvicorn.Config, *, ready: str, closing: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_OF_STRANGERS)
        self._ready, self._closing = ready, closing

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a bound of TLS handshakes, which it has no setting for, and with the
        line that whoever started us waits for."""
        if self.config.is_ssl:
            loop = asyncio.get_running_loop()
            loop.create_server = partial(  # type: ignore[method-assign]
                loop.create_server, ssl_handshake_timeout=TLS_HANDSHAKE_S_MAX
            )
        await super().startup(sockets=sockets)
        if self.started:
            print(self._ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, after streams were told to end: they would outlast every patience."""
        if self._closing is not None:
            self._closing()
        await super().shutdown(sockets=sockets)

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


def _refused(error: LumarisError, *, status: int | None = None) -> Response:
    name = secrets.token_hex(8)
    response = problems.respond(error, name, status=status)
    response.headers["X-Request-ID"] = name
    return response


def _head_too_large() -> Response:
    error = LumarisError("oversize", f"A request's head may have {HEAD_BYTES_MAX} bytes.")
    return _refused(error, status=431)


def _refusing(response: Response) -> ASGIApp:
    """An app that answers this, and ends the connection."""
    response.headers["Connection"] = "close"
    return response
