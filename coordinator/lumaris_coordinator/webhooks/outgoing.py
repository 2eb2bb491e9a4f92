"""Requests to addresses that strangers name, kept out of the network that this program runs in.

The name is looked up once, every address found must be public, and the connection goes to the one
that was checked: a name that resolves to something else a moment later changes nothing. TLS is
still checked against the name. Redirects are not followed, proxies of the environment are not
used, and nothing of the answer is read but its status.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol

import anyio
import httpx
from anyio import to_thread

from lumaris_coordinator.bounds import (
    WEBHOOK_ADDRESSES_MAX,
    WEBHOOK_ATTEMPT_S_MAX,
    WEBHOOK_LOOKUPS_MAX,
)
from lumaris_overlay.networks import is_public
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import WEBHOOK_URL_CHARS_MAX

Post = Callable[[bytes, dict[str, str]], Awaitable[int]]
_PORTS: Final = {"https": 443, "http": 80}


class UnreachableError(Exception):
    """The request got no answer: `reason` is one of a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Sender(Protocol):
    """Opens the way to one URL for a few requests."""

    def open(self, url: str) -> AbstractAsyncContextManager[Post]:
        """A function that posts a body with headers and returns the status of the answer.

        Raises UnreachableError, on entry or by the function.
        """
        ...


def check_url(url: str, *, loopback: bool) -> None:
    """Refuse what can never be a webhook's address. Raises LumarisError `unsafe_url`."""
    try:
        found = httpx.URL(url)
        host, port = found.host, found.port
    except (httpx.InvalidURL, ValueError, TypeError):
        raise LumarisError("unsafe_url", "The URL cannot be read.") from None
    plain = url.isascii() and url.isprintable() and " " not in url
    if (
        not plain
        or len(url) > WEBHOOK_URL_CHARS_MAX
        or not host
        or found.userinfo
        or found.fragment
    ):
        raise LumarisError("unsafe_url")
    if found.scheme not in (("https", "http") if loopback else ("https",)):
        raise LumarisError("unsafe_url")
    if port is not None and not 1 <= port <= 65_535:
        raise LumarisError("unsafe_url")
    if _is_ip(host) and not _allowed(host, found.scheme, loopback=loopback):
        raise LumarisError("unsafe_url")


class PinnedSender:
    """The sender over httpx."""

    def __init__(self, *, loopback: bool = False, trusted: ssl.SSLContext | None = None) -> None:
        self._loopback = loopback
        self._trusted = trusted
        self._lookups: anyio.CapacityLimiter | None = None

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Post]:
        """As Sender.open."""
        found = httpx.URL(url)
        if self._lookups is None:  # it belongs to the event loop, which begins after us
            self._lookups = anyio.CapacityLimiter(WEBHOOK_LOOKUPS_MAX)
        # Waiting for one's turn is no fault of the name.
        async with self._lookups:
            with anyio.move_on_after(WEBHOOK_ATTEMPT_S_MAX) as scope:
                address = await self._resolve(found)
        if scope.cancelled_caught:
            raise UnreachableError("timeout")
        if self._trusted is None:  # on first use: reading the authorities takes 20 ms
            self._trusted = httpx.create_ssl_context(trust_env=False)
        pinned = found.copy_with(host=address)
        fixed = {"host": found.netloc.decode(), "accept-encoding": "identity"}
        async with httpx.AsyncClient(
            verify=self._trusted,
            trust_env=False,
            follow_redirects=False,
            timeout=WEBHOOK_ATTEMPT_S_MAX,
        ) as client:

            async def post(body: bytes, headers: dict[str, str]) -> int:
                with anyio.move_on_after(WEBHOOK_ATTEMPT_S_MAX):
                    try:
                        async with client.stream(
                            "POST",
                            pinned,
                            content=body,
                            headers={**headers, **fixed},
                            extensions={"sni_hostname": found.host},
                        ) as answer:
                            return answer.status_code
                    except httpx.TimeoutException:
                        raise UnreachableError("timeout") from None
                    except httpx.HTTPError:
                        raise UnreachableError("no_connection") from None
                raise UnreachableError("timeout")

            yield post

    async def _resolve(self, url: httpx.URL) -> str:
        port = url.port or _PORTS[url.scheme]
        try:
            found = await look_up(url.host, port)
        except (OSError, UnicodeError):
            raise UnreachableError("no_address") from None
        addresses = [str(entry[4][0]) for entry in found[:WEBHOOK_ADDRESSES_MAX]]
        if not addresses:
            raise UnreachableError("no_address")
        # One private address among them is a name that is pointed at us on purpose.
        if not all(_allowed(ip, url.scheme, loopback=self._loopback) for ip in addresses):
            raise UnreachableError("unsafe_address")
        return addresses[0]


async def look_up(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    """As socket.getaddrinfo, in a thread of its own that is left behind when nobody waits for it
    any more: the resolver gives up by itself. Raises OSError or UnicodeError."""

    def call() -> Sequence[tuple[Any, ...]]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    # Not of the threads that everything else shares; the caller bounds how many there are.
    free = anyio.CapacityLimiter(1)
    return await to_thread.run_sync(call, abandon_on_cancel=True, limiter=free)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _allowed(ip: str, scheme: str, *, loopback: bool) -> bool:
    if loopback and ipaddress.ip_address(ip.partition("%")[0]).is_loopback:
        return True
    return scheme == "https" and is_public(ip)
