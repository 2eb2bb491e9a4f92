"""The ASGI layer that counts requests by address and tells callers how much they have left."""

from __future__ import annotations

import logging
from functools import lru_cache
from ipaddress import ip_address

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_coordinator.bounds import ADDRESSES_REMEMBERED_MAX, FORWARDED_CHARS_MAX
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.limits.gcra import Outcome
from lumaris_coordinator.limits.limiter import (
    LOCAL,
    UNKNOWN,
    Limiter,
    RateLimitedError,
    group_of,
)

log = logging.getLogger(__name__)

_GROUP, _OUTCOME = "lumaris.address", "lumaris.rate"
# Asked by what supervises us, as often as it likes.
_FREE = frozenset(("/healthz", "/readyz"))
# Every request of a connection comes from the same address.
counted_as = lru_cache(maxsize=ADDRESSES_REMEMBERED_MAX)(group_of)


class Limits:
    """Inside the door, before the routes. With `proxies`, the address is what the last of them
    added to X-Forwarded-For; without, that header is a stranger's word and is not read.

    This machine itself is not counted, unless it is the proxy. One that forwards without being
    named as a proxy shares one bucket with everybody behind it: who they are cannot be told.
    """

    def __init__(self, app: ASGIApp, limiter: Limiter, *, proxies: frozenset[str]) -> None:
        self._app, self._limiter = app, limiter
        self._proxies = frozenset(map(plain_address, proxies))
        self._told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        group = scope[_GROUP] = counted_as(self._address_of(scope))

        async def send_telling(message: Message) -> None:
            if message["type"] == "http.response.start" and _OUTCOME in scope:
                message["headers"] = [*message.get("headers", ()), *_headers(scope[_OUTCOME])]
            await send(message)

        if group is not None and scope["path"] not in _FREE:
            outcome = scope[_OUTCOME] = self._limiter.anonymous(group, scope["path"])
            if not outcome.allowed:
                await self._refuse(scope, receive, send_telling, outcome)
                return
        await self._app(scope, receive, send_telling)

    def _address_of(self, scope: Scope) -> str:
        client = scope.get("client")
        address = plain_address(str(client[0])) if client else ""
        if address in self._proxies:
            # From the right: what stands left of the first stranger was written by that stranger.
            return next((part for part in _forwarded(scope) if part not in self._proxies), address)
        if counted_as(address) is None and _forwarded(scope):
            if not self._told:
                log.warning(
                    "requests are forwarded from %s, which is not among the `proxies`: all of them"
                    " share one rate",
                    address,
                )
                self._told = True
            return UNKNOWN
        return address

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, outcome: Outcome) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": "rate_limited"})
            return
        name = str(scope.get("lumaris.request_id", ""))
        await problems.respond(RateLimitedError(outcome), name)(scope, receive, send)


def address_of(request: Request) -> str:
    """What the request's address is counted as; a name for this machine itself."""
    return str(request.scope.get(_GROUP) or LOCAL)


def known_address(request: Request) -> str:
    """As `address_of`, "" where everybody may be behind it."""
    found = address_of(request)
    return "" if found in (LOCAL, UNKNOWN) else found


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


@lru_cache(maxsize=ADDRESSES_REMEMBERED_MAX)
def plain_address(text: str) -> str:
    """An IP address as it is compared: without a port, brackets or the IPv6 form of an IPv4 one.
    What is no address stays as it is."""
    shown = text.strip()
    if shown.startswith("["):
        shown = shown[1:].partition("]")[0]
    elif shown.count(":") == 1:
        shown = shown.partition(":")[0]
    try:
        found = ip_address(shown)
    except ValueError:
        return text.strip()
    return str(getattr(found, "ipv4_mapped", None) or found)


def _forwarded(scope: Scope) -> list[str]:
    """The addresses of X-Forwarded-For, the last one first."""
    found: list[str] = []
    for name, value in reversed(scope["headers"]):
        if name == b"x-forwarded-for":
            parts = value[-FORWARDED_CHARS_MAX:].decode("latin-1").split(",")
            found += map(plain_address, reversed(parts))
    return found


def _headers(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    """RateLimit fields of draft-ietf-httpapi-ratelimit-headers, and Retry-After (RFC 9110)."""
    policy = f'"{outcome.policy}";q={outcome.burst};w={outcome.window_s}'
    state = f'"{outcome.policy}";r={outcome.left};t={outcome.retry_after_s}'
    found = [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]
    if not outcome.allowed:
        found.append((b"retry-after", str(outcome.retry_after_s).encode()))
    return found
