"""The ASGI layer that counts requests by address and tells callers how much they have left."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_coordinator.bounds import FORWARDED_CHARS_MAX
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.limits.gcra import Outcome
from lumaris_coordinator.limits.limiter import Limiter, RateLimitedError, group_of

_GROUP, _OUTCOME = "lumaris.address", "lumaris.rate"
# Asked by what supervises us, as often as it likes.
_FREE = frozenset(("/healthz", "/readyz"))


class Limits:
    """Inside the door, before the routes. With `proxies`, the address is what the last of them
    added to X-Forwarded-For; without, that header is a stranger's word and is not read.

    This machine itself is not counted, unless it is the proxy.
    """

    def __init__(self, app: ASGIApp, limiter: Limiter, *, proxies: frozenset[str]) -> None:
        self._app, self._limiter, self._proxies = app, limiter, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        group = scope[_GROUP] = group_of(_address_of(scope, self._proxies))

        async def send_telling(message: Message) -> None:
            if message["type"] == "http.response.start" and _OUTCOME in scope:
                outcome = scope[_OUTCOME]
                message["headers"] = [*message.get("headers", ()), *_headers(outcome)]
            await send(message)

        if group is not None and scope["path"] not in _FREE:
            outcome = scope[_OUTCOME] = self._limiter.anonymous(group, scope["path"])
            if not outcome.allowed:
                await self._refuse(scope, receive, send_telling, outcome)
                return
        await self._app(scope, receive, send_telling)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, outcome: Outcome) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": "rate_limited"})
            return
        name = str(scope.get("lumaris.request_id", ""))
        await problems.respond(RateLimitedError(outcome), name)(scope, receive, send)


def address_of(request: Request) -> str:
    """What the request's address is counted as; a name for this machine itself."""
    return str(request.scope.get(_GROUP) or "local")


def count_caller(request: Request, limiter: Limiter, caller: Caller) -> None:
    """Count a request by its credentials from here on; from this machine itself only API keys are
    counted. Raises LumarisError `rate_limited`."""
    if request.scope.get(_GROUP) is None and not caller.rate:
        return
    outcome = limiter.known(caller, address_of(request))
    request.scope[_OUTCOME] = outcome
    if not outcome.allowed:
        raise RateLimitedError(outcome)


def note(request: Request, error: RateLimitedError) -> None:
    """Let the answer's headers tell of the bucket that was empty."""
    request.scope[_OUTCOME] = error.outcome


def _address_of(scope: Scope, proxies: frozenset[str]) -> str:
    client = scope.get("client")
    address = str(client[0]) if client else ""
    if address not in proxies:
        return address
    for name, value in reversed(scope["headers"]):
        if name == b"x-forwarded-for":
            # From the right: what stands left of the first stranger was written by that stranger.
            for part in reversed(value[-FORWARDED_CHARS_MAX:].decode("latin-1").split(",")):
                found: str = part.strip()
                if found not in proxies:
                    return found
    return address


def _headers(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    """RateLimit fields of draft-ietf-httpapi-ratelimit-headers, and Retry-After (RFC 9110)."""
    policy = f'"{outcome.policy}";q={outcome.burst};w={outcome.window_s}'
    state = f'"{outcome.policy}";r={outcome.left};t={outcome.retry_after_s}'
    found = [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]
    if not outcome.allowed:
        found.append((b"retry-after", str(outcome.retry_after_s).encode()))
    return found
