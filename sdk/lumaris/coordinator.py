"""The buyer's line to the coordinator; the only module here that speaks HTTP."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TypeVar

import httpx

from lumaris.profile import Profile
from lumaris_overlay.coordinator_line import CoordinatorLine
from lumaris_overlay.coordinator_tls import FILE_NAME, CoordinatorTls
from lumaris_overlay.private_files import load_or_create_key
from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.keys import KeyPair

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


def open_link(profile: Profile) -> CoordinatorLink:
    """The line of a profile. Raises LumarisError for files that cannot be used."""
    key = load_or_create_key(profile.key_file)
    return link_in(profile.state, profile.coordinator, key, ca_file=profile.ca_file)


def link_in(folder: Path, url: str, key: KeyPair, *, ca_file: Path | None) -> CoordinatorLink:
    """The line of whoever has this key and folder. Raises LumarisError as `open_link` does."""
    tls = CoordinatorTls(url, ca_file=ca_file, key=key, file=folder / FILE_NAME)
    return CoordinatorLink(url, tls=tls)
