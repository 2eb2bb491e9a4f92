"""Devnets of real processes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lumaris.testing.devnet import Devnet


def processes_of(folder: Path) -> list[str]:
    """Command lines of every process that names a folder: what a devnet would leave behind."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in command and process.status() != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Devnet]:
    """A coordinator, one seller and a funded buyer; afterwards nothing of it is left."""
    devnet = Devnet(tmp_path / "net", sellers=1)
    with devnet:
        yield devnet
    assert processes_of(devnet.state) == []
    assert not devnet.state.exists()
