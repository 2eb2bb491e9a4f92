"""A market in one process: the real coordinator behind an in-memory transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lumaris_coordinator import Coordinator, Settings, create_app
from tests.coordinator.builders import NETWORK, Clock, Market


@asynccontextmanager
async def open_market(
    state: Path, *, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Market]:
    """A coordinator over a state directory, running."""
    clock = clock or Clock()
    coordinator = Coordinator(Settings(state=state, network=NETWORK, **settings), clock=clock)
    transport = httpx.ASGITransport(create_app(coordinator))
    async with (
        coordinator.running(),
        httpx.AsyncClient(transport=transport, base_url="http://coordinator") as client,
    ):
        yield Market(coordinator, client, clock)


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[Market]:
    async with open_market(tmp_path / "state") as found:
        yield found
