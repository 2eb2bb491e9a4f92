"""Events as they happen: Server-Sent Events and a WebSocket over the same reader.

Both send a sign of life when nothing happens, check the credentials again as often, end after
EVENTS_STREAM_S_MAX, and leave a reader that is too slow with the cursor from which it resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from lumaris_coordinator.bounds import (
    EVENTS_HEARTBEAT_S,
    EVENTS_SEND_S_MAX,
    EVENTS_STREAM_S_MAX,
)
from lumaris_coordinator.events.hub import Follower, Hub, Line
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[object]]

# WebSocket close codes of RFC 6455 and its registry.
NORMAL: Final = 1000
POLICY: Final = 1008
RESTARTS: Final = 1012
TRY_LATER: Final = 1013


class Ended(Exception):  # noqa: N818 - an end, not an error
    """The stream is over: why, and the close code that says so."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.reason, self.code = reason, code


async def _follow(
    hub: Hub,
    follower: Follower,
    check: Check,
    send: Callable[[list[Line]], Awaitable[None]],
) -> None:
    """Send batches until an end, which is raised as Ended. An empty batch is a sign of life."""
    ends_at = anyio.current_time() + EVENTS_STREAM_S_MAX
    checked_at = anyio.current_time()
    while True:
        try:
            lines = await follower.next(wait_s=EVENTS_HEARTBEAT_S)
        except LumarisError as error:
            raise Ended(error.code, TRY_LATER) from None
        now = anyio.current_time()
        if not lines:
            if follower.lagging:
                raise Ended("lagging", TRY_LATER)
            if hub.closing:
                raise Ended("restarting", RESTARTS)
        if now >= checked_at + EVENTS_HEARTBEAT_S:
            checked_at = now
            try:
                await check()
            except LumarisError as error:
                # A store that cannot be asked says nothing of the credentials.
                code = TRY_LATER if error.code in ("busy", "timeout") else POLICY
                raise Ended(error.code, code) from None
        with anyio.move_on_after(EVENTS_SEND_S_MAX) as scope:
            await send(lines)
        if scope.cancelled_caught:
            raise Ended("lagging", TRY_LATER)
        if now >= ends_at:
            raise Ended("resume", NORMAL)


class EventStream(Response):
    """The Server-Sent Events of one follower, which is closed with it."""

    def __init__(self, hub: Hub, follower: Follower, check: Check) -> None:
        super().__init__(media_type="text/event-stream")
        self._hub, self._follower, self._check = hub, follower, check
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until an end or until the reader goes away."""

        async def send_lines(lines: list[Line]) -> None:
            data = b"".join(line.sse for line in lines) or b": alive\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def serve(cancel: anyio.CancelScope) -> None:
            try:
                await send_lines([])
                await _follow(self._hub, self._follower, self._check, send_lines)
            except Ended as ended:
                await _within(send, _last_words(ended, self._follower.cursor))
            cancel.cancel()

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(serve, tasks.cancel_scope)
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()
        finally:
            self._follower.close()


def _last_words(ended: Ended, cursor: int) -> dict[str, object]:
    """The stream's last event: why it ends, with the id to resume from."""
    text = msgspec.json.encode({"reason": ended.reason, "after": cursor})
    data = b"id: %d\nevent: end\ndata: %s\n\n" % (cursor, text)
    return {"type": "http.response.body", "body": data, "more_body": False}


async def _within(send: Send, message: dict[str, object]) -> None:
    with anyio.move_on_after(EVENTS_SEND_S_MAX):
        await send(message)


async def serve_socket(socket: WebSocket, hub: Hub, follower: Follower, check: Check) -> None:
    """Send an accepted WebSocket its events as JSON texts; closes it and the follower.

    What the reader sends is not read beyond noticing that it went away. The close reason is
    `<code> after=<cursor>`.
    """

    async def send_lines(lines: list[Line]) -> None:
        for line in lines:
            await socket.send_text(line.data.decode())
        if not lines:
            await socket.send_text('{"type":"alive"}')

    async def serve(cancel: anyio.CancelScope) -> None:
        try:
            await _follow(hub, follower, check, send_lines)
        except Ended as ended:
            await close_socket(socket, ended, after=follower.cursor)
        except (WebSocketDisconnect, RuntimeError) as error:
            log.debug("a WebSocket went away: %s", error)
        cancel.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, tasks.cancel_scope)
            while (await socket.receive())["type"] != "websocket.disconnect":
                pass
            tasks.cancel_scope.cancel()
    finally:
        follower.close()


async def close_socket(socket: WebSocket, ended: Ended, *, after: int | None = None) -> None:
    """Close with the reason; a reader that does not even read that is left."""
    reason = ended.reason if after is None else f"{ended.reason} after={after}"
    with anyio.move_on_after(EVENTS_SEND_S_MAX):
        await socket.close(ended.code, reason)
