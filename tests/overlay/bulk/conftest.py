from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.overlay.bulk.world import WAIT_S, World, open_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with trio.fail_after(3 * WAIT_S):
        async with open_world(tmp_path) as world:
            yield world
