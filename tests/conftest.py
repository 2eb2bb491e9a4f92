"""What tests of every folder share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.market import Market


@pytest.fixture
def docker_engine() -> str:
    """The address of a Docker engine. Without one the test is skipped, or fails where required."""
    host = os.environ.get("DOCKER_HOST", "")
    if not host:
        reason = "needs a Docker engine: set DOCKER_HOST (tests/engine.sh up DIR starts one)"
        if os.environ.get("LUMARIS_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return host


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled modules that all sellers of this run share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
async def market(tmp_path: Path, compiled: Path) -> AsyncIterator[Market]:
    """A whole market in this process."""
    from tests.market import open_market  # every part at once: only for tests that trade

    async with open_market(tmp_path, compiled) as found:
        yield found
