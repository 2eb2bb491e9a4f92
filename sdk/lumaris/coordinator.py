"""The buyer's line to the coordinator; the only module here that speaks HTTP."""

from __future__ import annotations

from typing import TypeVar

import httpx

from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.errors import LumarisError

T = TypeVar("T")

_TIMEOUT_S = 10


class CoordinatorLink:
    """Calls one coordinator. Every failure is a LumarisError; none is retried here."""

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._client = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT_S, trust_env=False, transport=transport
        )
        self._url = url

    async def call(self, request: Request[T]) -> T:
        """Send a request and read its answer. Raises LumarisError `coordinator_unreachable`."""
        try:
            answer = await self._client.request(
                request.method, request.path, content=request.body, headers=request.headers
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            raise LumarisError("coordinator_unreachable", f"No answer from {self._url}.") from None
        return request.read(answer.status_code, answer.content)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
