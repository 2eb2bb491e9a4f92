"""What tests of every folder share."""

from __future__ import annotations

import os

import pytest


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
