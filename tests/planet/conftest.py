"""Devnets of real processes for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris import processes
from lumaris.testing.devnet import Devnet
from lumaris_node.selftest import image
from tests.planet.execution import Shelf


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Devnet]:
    """A coordinator, one seller and a funded buyer; afterwards nothing of it is left."""
    devnet = Devnet(tmp_path / "net", sellers=1)
    with devnet:
        yield devnet
    assert processes.naming(str(devnet.state)) == []
    assert not devnet.state.exists()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """What sellers of tests that run hostile code share, so that each is up in seconds."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "modules").mkdir()
    return Shelf(image.build(folder), folder / "modules")


@pytest.fixture(scope="session")
def tiers(native_sandbox: None) -> tuple[str, ...]:
    """The tiers that this machine can run: with containers where there is an engine."""
    return ("process", "wasm", *(("container",) if os.environ.get("DOCKER_HOST") else ()))
