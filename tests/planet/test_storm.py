"""A storm of settlements while the coordinator is killed: nothing acknowledged is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.planet.storm import storm

pytestmark = [pytest.mark.planet, pytest.mark.slow]

CLIENTS = 64
# The full size is LUMARIS_STORM=100000; that many operations take a kill for each 5,000.
FULL = int(os.environ.get("LUMARIS_STORM", "0"))
OPERATIONS = FULL or 1_000
KILLS = max(3, FULL // 5_000)


async def test_a_storm_with_kills(tmp_path: Path) -> None:
    found = await storm(tmp_path / "state", operations=OPERATIONS, clients=CLIENTS, kills=KILLS)
    assert found.done >= OPERATIONS
    assert (found.killed, found.target.starts) == (KILLS, KILLS + 1)
    assert found.repeated >= KILLS, "no kill fell into work"
