"""/v1/events, /v1/events/page, /v1/stream."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from lumaris_coordinator.bounds import EVENTS_HELLO_S_MAX, EVENTS_PAGE_MAX
from lumaris_coordinator.events import outbox, retention
from lumaris_coordinator.events.hub import parties_of
from lumaris_coordinator.events.stream import (
    POLICY,
    TRY_LATER,
    Ended,
    EventStream,
    close_socket,
    serve_socket,
)
from lumaris_coordinator.http import BEARER, caller_of, coordinator_of, json_response
from lumaris_coordinator.identity.service import Caller
from lumaris_coordinator.limits.middleware import known_address
from lumaris_coordinator.store.port import Connection
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import SEQ_MAX

router = APIRouter(tags=["events"])

After = Annotated[int | None, Query(ge=0, le=SEQ_MAX)]

_STREAM: dict[str, Any] = {
    **BEARER,
    "parameters": [
        {
            "name": "Last-Event-ID",
            "in": "header",
            "required": False,
            "description": "As `after`; an EventSource sends it when it reconnects.",
            "schema": {"type": "string", "maxLength": 19},
        }
    ],
}


class Hello(msgspec.Struct, forbid_unknown_fields=True):
    """The first message of a WebSocket that could not send an Authorization header."""

    token: str


@router.get("/v1/events", openapi_extra=_STREAM)
async def events(request: Request, after: After = None) -> Response:
    """The caller's events as Server-Sent Events, from those after `after` or `Last-Event-ID`, or
    from now on. The last one of a stream is `end` with {reason, after}: reconnect with that."""
    caller = await caller_of(request)
    hub = coordinator_of(request).events
    last = request.headers.get("last-event-id")
    if last is not None:
        after = _event_id(last)
    await hub.store.read(lambda connection: retention.check_cursor(connection, after))
    follower = hub.open(caller, after=after, address=known_address(request))
    return EventStream(hub, follower, lambda: _still(request, caller))


@router.get("/v1/events/page", openapi_extra=BEARER)
async def page(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=EVENTS_PAGE_MAX)] = EVENTS_PAGE_MAX,
) -> Response:
    """{events, next}: the caller's events, oldest first; pass `next` as `after`, null at the end.
    Event ids are the cursors of the streams as well."""
    caller = await caller_of(request)

    def look(connection: Connection) -> list[outbox.Event]:
        retention.check_cursor(connection, after)
        return outbox.newer_of(connection, parties_of(caller), after=after, limit=limit + 1)

    found = await coordinator_of(request).store.read(look)
    shown = [msgspec.Raw(event.encode()) for event in found[:limit]]
    return json_response(
        {"events": shown, "next": found[limit - 1].id if len(found) > limit else None}
    )


@router.websocket("/v1/stream")
async def stream(socket: WebSocket, after: After = None) -> None:
    """The caller's events as JSON texts. The token comes in the Authorization header or in the
    first message, {"token": …}. A close reason tells where to resume: `<why> after=<id>`."""
    await socket.accept()
    hub = coordinator_of(_asked(socket, "")).events
    try:
        authorization = socket.headers.get("authorization") or await _hello(socket)
        request = _asked(socket, authorization)
        caller = await caller_of(request)
        await hub.store.read(lambda connection: retention.check_cursor(connection, after))
        follower = hub.open(caller, after=after, address=known_address(request))
    except WebSocketDisconnect:
        return
    except LumarisError as error:
        code = TRY_LATER if error.code in ("busy", "too_many") else POLICY
        await close_socket(socket, Ended(error.code, code))
        return

    await serve_socket(socket, hub, follower, lambda: _still(request, caller))


def _asked(socket: WebSocket, authorization: str) -> Request:
    """The request that the socket began as, with these credentials: so they are checked and
    counted like those of any other."""
    headers = [item for item in socket.scope["headers"] if item[0] != b"authorization"]
    headers.append((b"authorization", authorization.encode("latin-1", errors="replace")))
    return Request({**socket.scope, "type": "http", "method": "GET", "headers": headers})


async def _hello(socket: WebSocket) -> str:
    with anyio.move_on_after(EVENTS_HELLO_S_MAX):
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        try:
            found = msgspec.json.decode(message.get("text") or "", type=Hello)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise LumarisError("malformed", "The first message is not {token}.") from None
        return f"Bearer {found.token}"
    raise LumarisError("unauthorized")


async def _still(request: Request, caller: Caller) -> None:
    """A stream shows what its caller could see when it began; when that changes, it ends."""
    try:
        now = await caller_of(request)
    except LumarisError as error:
        if error.code == "rate_limited":  # of a caller that is known
            return
        raise
    if parties_of(caller) != parties_of(now):
        raise LumarisError("forbidden", "What these credentials may see has changed.")


def _event_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= SEQ_MAX):
        raise LumarisError("malformed", "Last-Event-ID is not an event's id.")
    return int(text)
