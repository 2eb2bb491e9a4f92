"""The node's line to its coordinator; the only module here that speaks HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import httpx

from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Info, Membership, Request
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.budget import Registration

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

    async def info(self) -> Info:
        """The coordinator's name, key and terms."""
        return await self.call(coordinator_api.info())

    async def register(
        self, key: KeyPair, info: Info, *, addresses: tuple[str, ...], clock: Callable[[], float]
    ) -> Membership:
        """Prove our key and get a certificate in the role of a seller."""
        challenge = await self.call(coordinator_api.challenge(key.peer_id))
        registration = Registration(
            peer=key.peer_id,
            coordinator=info.coordinator,
            challenge=challenge.challenge,
            roles=("seller",),
            addresses=addresses,
            issued_at=int(clock()),
        )
        signed = codec.sign(registration, key, info.network)
        return await self.call(coordinator_api.register(signed.data))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
