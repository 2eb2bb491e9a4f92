"""How a line to a coordinator is kept, whatever speaks HTTP: certificates come and go under it."""

from __future__ import annotations

import logging
import ssl
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import trio

from lumaris_overlay.coordinator_tls import CoordinatorTls
from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

T = TypeVar("T")
ClientT = TypeVar("ClientT")


class CoordinatorLine(ABC, Generic[ClientT]):
    """Calls one coordinator over clients of some HTTP library. Every failure is a LumarisError;
    none is retried but for the certificate that a coordinator with mutual TLS asks for."""

    def __init__(self, url: str, tls: CoordinatorTls | None) -> None:
        self._url = url
        self._tls = tls or CoordinatorTls(url)
        self._client = self._connect(self._tls.context())
        self._enrolling = trio.Lock()

    @abstractmethod
    def _connect(self, context: ssl.SSLContext | None) -> ClientT:
        """A client; without a context it speaks plain HTTP."""

    @abstractmethod
    async def _send(self, client: ClientT, request: Request[T]) -> T:
        """Ask and read. Raises the LumarisError of `self._tls.explain` when nobody answers."""

    @abstractmethod
    async def _close(self, client: ClientT) -> None:
        """Close a client's connections."""

    async def call(self, request: Request[T]) -> T:
        """Send a request and read its answer.

        Raises LumarisError: `coordinator_unreachable`, `certificate_untrusted`, or a refusal.
        """
        if self._tls.is_due:
            await self._renew(self._client)
        client = self._client
        try:
            return await self._send(client, request)
        except LumarisError as error:
            if error.code != "certificate_needed":
                raise
        await self._enrol(client)
        return await self._send(self._client, request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._close(self._client)

    async def _renew(self, client: ClientT) -> None:
        try:
            await self._enrol(client)
        except LumarisError as error:
            if not self._tls.is_valid:
                raise
            log.warning("TLS certificate not renewed code=%s", error.code)

    async def _enrol(self, client: ClientT) -> None:
        """Get a certificate, and connections that show it instead of `client`'s."""
        async with self._enrolling:
            if self._client is not client:
                return  # another task has meanwhile
            bare = self._connect(self._tls.context(shown=False))
            try:
                await self._tls.enrol(lambda request: self._send(bare, request))
            finally:
                with trio.CancelScope(shield=True):
                    await self._close(bare)
            self._client = self._connect(self._tls.context())
            await self._close(client)
