"""A market in one process: the real coordinator behind an in-memory transport.

A module that says `STORES = ("sqlite", "postgres")` runs its tests of the `market`, and of whatever
else asks for `database`, on both kinds of store. LUMARIS_TEST_STORE=postgres runs the tests of the
other modules on PostgreSQL as well: too slow for every day, good before a release.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lumaris_coordinator import Coordinator, Settings, create_app
from tests.coordinator.builders import NETWORK, Clock, Market
from tests.coordinator.conform import hold_to_description
from tests.coordinator.postgres import Server, running_server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for each store that the module names."""
    stores = getattr(metafunc.module, "STORES", ())
    if stores and "database" in metafunc.fixturenames:
        metafunc.parametrize("database", stores, indirect=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """One PostgreSQL server for the whole run."""
    with running_server() as server:
        yield server


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The setting `database`: "" for a file, or the address of a database with the schema."""
    kind = getattr(request, "param", os.environ.get("LUMARIS_TEST_STORE", "sqlite"))
    if kind == "sqlite":
        yield ""
        return
    server: Server = request.getfixturevalue("postgres_server")
    with server.database() as dsn:
        yield dsn


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
        httpx.AsyncClient(
            transport=transport,
            base_url="http://coordinator",
            event_hooks={"response": [hold_to_description]},
        ) as client,
    ):
        yield Market(coordinator, client, clock)


@pytest.fixture
async def market(tmp_path: Path, database: str) -> AsyncIterator[Market]:
    async with open_market(tmp_path / "state", database=database) as found:
        yield found
