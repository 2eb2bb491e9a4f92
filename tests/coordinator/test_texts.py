"""Characters that a database cannot keep are the fault of who sends them, on either store."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import httpx
import pytest

from lumaris_coordinator.store.port import first
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, credit_request
from tests.coordinator.conftest import open_market
from tests.coordinator.postgres import Server
from tests.coordinator.test_users import PASSWORD, sign_up, town

__all__ = ["town"]
STORES = ("sqlite", "postgres")

_PATHS = (
    ("GET", "/v1/receipts/%00"),
    ("GET", "/v1/webhooks/a%00b"),
    ("GET", "/log/tile/0/%00"),
    ("GET", "/v1/offers?region=%00"),
    ("DELETE", "/v1/users/me/peers/%00"),
    ("POST", "/v1/api-keys/%00/rotate"),
)
_BODIES = (
    ("/v1/sessions", {"name": "a\0b", "password": "x"}),
    ("/v1/users", {"name": "abc", "password": PASSWORD + "\0"}),
    ("/v1/payouts", {"adapter": "a\0", "amount_nanos": 10**9}),
    ("/v1/webhooks", {"url": "https://example.com/\0"}),
)


async def test_a_nul_is_malformed(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    headers = {"authorization": f"Bearer {token}", "idempotency-key": "k"}
    answers: list[httpx.Response] = []
    for method, path in _PATHS:
        answers.append(await town.client.request(method, path, headers=headers))
    for path, body in _BODIES:
        given = {**headers, "content-type": "application/json"}
        answers.append(await town.client.post(path, content=json.dumps(body), headers=given))
    told = [(str(answer.url), answer.status_code, answer.json()["code"]) for answer in answers]
    assert [(status, code) for _, status, code in told] == [(400, "malformed")] * len(told), told
    # Six characters that only look like one.
    shown = await town.client.post("/v1/sessions", content=rb'{"name":"a\\u0000","password":"x"}')
    assert shown.status_code == 401


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
async def test_a_text_that_came_another_way_harms_nobody_beside_it(
    tmp_path: Path, text: str, postgres_server: Server
) -> None:
    """In the same batch as others, of a server, which is the one that keeps less."""
    codes: list[object] = []
    with postgres_server.database() as dsn:
        async with open_market(tmp_path / "state", database=dsn) as market:
            await _mix(market, text, codes)
    assert sorted(map(str, codes)) == ["200"] * 5 + ["malformed"] * 10


async def _mix(town: Market, text: str, codes: list[object]) -> None:
    store, parties = town.coordinator.store, [await town.party(f"p{number}") for number in range(5)]

    async def bad() -> None:
        for ask in (store.submit, store.read):
            with pytest.raises(LumarisError) as caught:
                await ask(lambda found: first(found, "SELECT 1 FROM peer WHERE peer = ?", (text,)))
            codes.append(caught.value.code)

    async def good(body: bytes) -> None:
        codes.append((await town.client.post("/v1/credits", content=body)).status_code)

    async with anyio.create_task_group() as tasks:
        for party in parties:
            tasks.start_soon(good, credit_request(party, town.peer, 10**9, now=town.now))
            tasks.start_soon(bad)
    assert store.writer.stats.failed_batches == 0
