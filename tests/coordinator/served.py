"""A coordinator that serves on loopback, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from lumaris_coordinator import Coordinator, Settings, create_app
from lumaris_coordinator.server import Protocol, Server
from lumaris_coordinator.tls import server_tls
from tests.coordinator.builders import Party, registration


class InThread(Server):
    """Signals belong to the main thread."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Served:
    """A coordinator on loopback in a thread of this process."""

    def __init__(self, state: Path, **changes: Any) -> None:
        """`changes` are settings other than the defaults."""
        self.coordinator = Coordinator(Settings(state=state, overlay=False, **changes))
        self.url = ""
        self.token = ""
        self._ready = threading.Event()
        self._server: Server | None = None

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            coordinator = self.coordinator
            tls = server_tls(
                coordinator.settings, lambda: coordinator.authority, now=coordinator.context.now()
            )
            scheme = "https" if tls is not None else "http"
            self.url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
            config = uvicorn.Config(
                create_app(coordinator),
                http=Protocol,
                lifespan="off",
                log_config=None,
                **(tls.options() if tls is not None else {}),
            )
            self._server = InThread(config, ready="ready", closing=self.coordinator.events.close)
            async with self.coordinator.running():
                self.token = await self._register()
                serving = asyncio.create_task(self._server.serve(sockets=[listener]))
                while not self._server.started:
                    await asyncio.sleep(0.001)
                self._ready.set()
                await serving

    async def _register(self) -> str:
        identity, party = self.coordinator.identity, Party("ann")
        now = self.coordinator.context.now()
        challenge = identity.challenge(party.peer)["challenge"]
        body = registration(party, self.coordinator.peer_id, challenge, now=now)
        return str((await identity.register(body))["token"])

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            assert self._ready.wait(20)
            yield
        finally:
            assert self._server is not None
            self._server.should_exit = True
            thread.join(20)
