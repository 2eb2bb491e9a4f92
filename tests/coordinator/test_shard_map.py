"""The shard map that the coordinator serves: signed, checked at start, never taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.bounds import SHARD_MAP_RENEWED_S
from lumaris_protocol import coordinator_api as api
from lumaris_protocol import shards
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.shard_map import ShardMap
from tests.coordinator.builders import NETWORK, START, Clock, Market
from tests.coordinator.conftest import open_market

DIVIDED = [
    {"id": 1, "regions": ["eu"], "classes": ["cpu"]},
    {"id": 2, "classes": ["cpu"]},
    {"id": 3, "classes": ["gpu"]},
]


def write(folder: Path, parts: Any = DIVIDED, version: int = 1) -> Path:
    path = folder / f"map-{version}.json"
    path.write_text(json.dumps({"version": version, "shards": parts}))
    return path


async def served(market: Market) -> ShardMap:
    request = api.shards()
    answer = await market.client.request(request.method, request.path)
    found = shards.open_map(
        request.read(answer.status_code, answer.content),
        shards.default_map(NETWORK),
        network=NETWORK,
        signers={market.peer},
        now=market.clock.now,
    )
    return found.message


async def test_an_undivided_market_has_one_shard(market: Market) -> None:
    found = await served(market)
    assert (found.version, found.shards) == (0, shards.default_map(NETWORK).shards)


async def test_the_file_is_served_and_kept_over_a_start_without_it(tmp_path: Path) -> None:
    file = write(tmp_path)
    async with open_market(tmp_path / "state", shard_map=file) as market:
        first = await served(market)
        assert [shard.id for shard in first.shards] == [1, 2, 3]
    async with open_market(tmp_path / "state") as market:
        assert (await served(market)).shards == first.shards
    async with open_market(tmp_path / "state", shard_map=write(tmp_path, DIVIDED[1:], 2)) as market:
        assert (await served(market)).version == 2


async def test_it_is_signed_again_before_it_is_old(tmp_path: Path) -> None:
    clock = Clock()
    async with open_market(tmp_path / "state", clock=clock, shard_map=write(tmp_path)) as market:
        assert (await served(market)).issued_at == START
        clock.now += SHARD_MAP_RENEWED_S - 1
        assert (await served(market)).issued_at == START
        clock.now += 1
        assert (await served(market)).issued_at == clock.now


@pytest.mark.parametrize("parts", [DIVIDED[:2], DIVIDED])
async def test_a_version_is_never_taken_back_or_altered(tmp_path: Path, parts: Any) -> None:
    async with open_market(tmp_path / "state", shard_map=write(tmp_path, DIVIDED, 2)):
        pass
    version = 1 if parts == DIVIDED else 2
    changed = DIVIDED if version == 1 else [*DIVIDED[1:], {**DIVIDED[0], "id": 9}]
    with pytest.raises(LumarisError) as caught:
        async with open_market(tmp_path / "state", shard_map=write(tmp_path, changed, version)):
            pass
    assert caught.value.code == "config_invalid"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\xff",
        '{"version": 1, "shards": []}',
        '{"version": 0, "shards": [{"id": 0, "classes": ["cpu", "gpu"]}]}',
        '{"version": 1, "shards": [{"id": 0, "classes": ["cpu"]}]}',
        '{"version": 1, "shards": [{"id": 0, "classes": ["tpu"]}]}',
        '{"version": 1, "shards": [{"id": 0, "classes": ["cpu", "gpu"]}], "more": 1}',
        json.dumps({"version": 1, "shards": [DIVIDED[1], *DIVIDED]}),
        json.dumps(
            {
                "version": 1,
                "shards": [{"id": n, "regions": [f"r{n}"], "classes": ["cpu"]} for n in range(70)]
                + [{"id": 99, "classes": ["cpu", "gpu"]}],
            }
        ),
        " " * 9_000,
    ],
)
def test_a_bad_file_stops_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "map.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LumarisError) as caught:
        Coordinator(Settings(state=tmp_path / "state", shard_map=file))
    assert caught.value.code == "config_invalid"


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(LumarisError, match="No such file"):
        Coordinator(Settings(state=tmp_path / "state", shard_map=tmp_path / "none"))
