"""The node's line to its coordinator; the only module here that speaks HTTP."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TypeVar

import httpx

from lumaris_overlay.coordinator_line import CoordinatorLine
from lumaris_overlay.coordinator_tls import CoordinatorTls
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Info, Membership, Request
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.budget import Registration

T = TypeVar("T")

_TIMEOUT_S = 10
# There was a connection, and it ended before an answer.
_CUT_OFF = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class CoordinatorLink(CoordinatorLine[httpx.AsyncClient]):
    """Calls one coordinator through httpx."""

    def __init__(
        self,
        url: str,
        *,
        tls: CoordinatorTls | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._transport = transport
        super().__init__(url, tls)

    def _connect(self, context: ssl.SSLContext | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._url,
            timeout=_TIMEOUT_S,
            trust_env=False,
            transport=self._transport,
            verify=context or True,
        )

    async def _send(self, client: httpx.AsyncClient, request: Request[T]) -> T:
        try:
            answer = await client.request(
                request.method, request.path, content=request.body, headers=request.headers
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self._tls.explain(error, cut_off=isinstance(error, _CUT_OFF)) from None
        return request.read(answer.status_code, answer.content)

    async def _close(self, client: httpx.AsyncClient) -> None:
        await client.aclose()

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
