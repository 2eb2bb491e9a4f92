"""Fixtures of the node's tests: a market, with compiled guests kept for the whole run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.market import Market, open_market


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled modules that all sellers of this run share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
async def market(tmp_path: Path, compiled: Path) -> AsyncIterator[Market]:
    async with open_market(tmp_path, compiled) as found:
        yield found
