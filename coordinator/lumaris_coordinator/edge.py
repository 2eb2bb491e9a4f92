"""The door: what happens to every request before and after its handler.

Gives the request an id and its place in a trace, refuses large bodies before they are read, counts
and logs by route, and answers in place of anything that was not caught: no traceback leaves.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import aclosing
from typing import Final

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_coordinator.bounds import BODY_BYTES_MAX, BODY_READ_S_MAX
from lumaris_coordinator.logs import log_request
from lumaris_coordinator.metrics import Metrics
from lumaris_coordinator.tracing import Trace, trace_of
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE"))


_SWITCHED: Final = 101
_NOSNIFF: Final = (b"x-content-type-options", b"nosniff")


class Edge:
    """The outermost ASGI layer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope["lumaris.request_id"] = name = secrets.token_hex(8)
        scope["lumaris.trace"] = trace = trace_of(_header(scope, b"traceparent"))
        begun, status = time.perf_counter(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = list(message.get("headers", ()))
                headers.append((b"x-request-id", name.encode()))
                headers.append((b"traceparent", trace.traceparent.encode()))
                headers.append(_NOSNIFF)
            elif message["type"] == "websocket.accept":
                status = _SWITCHED
            await send(message)

        try:
            await self._serve(scope, receive, send_noting)
        except ClientDisconnect:
            log.debug("request %s: the client went away", name)
        except Exception:
            log.exception("request %s failed", name)
            if not status and scope["type"] == "http":
                response = problems.respond(LumarisError("internal"), name)
                await response(scope, receive, send_noting)
        finally:
            self._done(scope, status, time.perf_counter() - begun, trace)

    def _done(self, scope: Scope, status: int, took_s: float, trace: Trace) -> None:
        route = _route_of(scope)
        self._metrics.count(route, status, took_s)
        log_request(
            method=scope.get("method", "GET"),
            route=route.rpartition(" ")[2],
            status=status,
            took_ms=took_s * 1_000,
            request_id=scope["lumaris.request_id"],
            trace_id=trace.trace_id,
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = _refuse_early(scope) if scope["type"] == "http" else None
        if refused is not None:
            response = problems.respond(refused, scope["lumaris.request_id"])
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """The whole body, once. Raises LumarisError `oversize` or `timeout`."""
    parts: list[bytes] = []
    size = 0
    with anyio.move_on_after(BODY_READ_S_MAX) as scope:
        async with aclosing(request.stream()) as stream:
            async for part in stream:
                size += len(part)
                if size > BODY_BYTES_MAX:
                    raise _oversize(size)
                parts.append(part)
    if scope.cancelled_caught:
        raise LumarisError("timeout", "The request's body did not arrive in time.")
    body = b"".join(parts)
    request.state.body = body
    return body


def _refuse_early(scope: Scope) -> LumarisError | None:
    """A declared length over the limit or one that is no number, and a NUL in the target: no
    database keeps it."""
    if "\0" in scope["path"] or b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        return LumarisError("malformed", "The target holds a NUL.")
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                return LumarisError("malformed", "The Content-Length is not a number.")
            if int(value) > BODY_BYTES_MAX:
                return _oversize(int(value))
    return None


def _oversize(size: int) -> LumarisError:
    return LumarisError(
        "oversize", f"A body of {size} bytes or more; {BODY_BYTES_MAX} are allowed."
    )


def _route_of(scope: Scope) -> str:
    """`POST /v1/grants`, or `other` for what is no route here: labels must stay few."""
    path = getattr(scope.get("route"), "path", None)
    method = scope.get("method", "GET")  # a WebSocket begins as a GET
    return f"{method} {path}" if path is not None and method in _METHODS else "other"


def _header(scope: Scope, name: bytes) -> str | None:
    """A header that is given exactly once."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None
