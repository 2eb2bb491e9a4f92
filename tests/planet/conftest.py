"""Devnets of real processes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris import processes
from lumaris.testing.devnet import Devnet


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Devnet]:
    """A coordinator, one seller and a funded buyer; afterwards nothing of it is left."""
    devnet = Devnet(tmp_path / "net", sellers=1)
    with devnet:
        yield devnet
    assert processes.naming(str(devnet.state)) == []
    assert not devnet.state.exists()
