"""Which handler answers which protocol, and the running of a handler for one stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from lumaris_overlay.ports import OverlayStream, StreamHandler
from lumaris_protocol.errors import LocalError

logger = logging.getLogger(__name__)


class _Served:
    def __init__(self, handler: StreamHandler) -> None:
        self.handler = handler
        self.scopes: set[trio.CancelScope] = set()


class HandlerTable:
    """The protocols a host answers."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}

    def __contains__(self, protocol: str) -> bool:
        return protocol in self._served

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that are answered now."""
        return tuple(self._served)

    @asynccontextmanager
    async def serve(self, protocol: str, handler: StreamHandler) -> AsyncGenerator[None]:
        """Answer a protocol while the context lasts, then stop its running handlers.

        Raises LocalError `already_running` when the protocol is answered already.
        """
        if protocol in self._served:
            raise LocalError("already_running", f"{protocol} is answered already.")
        served = self._served[protocol] = _Served(handler)
        try:
            yield
        finally:
            del self._served[protocol]
            for scope in served.scopes:
                scope.cancel()

    async def answer(self, stream: OverlayStream) -> None:
        """Run the handler for an inbound stream to its end; a failure resets only that stream."""
        served = self._served.get(stream.protocol)
        if served is None:
            await stream.reset()
            return
        done = False
        with trio.CancelScope() as scope:
            served.scopes.add(scope)
            try:
                await served.handler(stream)
                done = True
            except Exception as error:
                logger.warning("handler protocol=%s error=%.300r", stream.protocol, error)
            finally:
                served.scopes.discard(scope)
                if not done:
                    await stream.reset()
        if done:
            await stream.aclose()
