"""Every failure is a problem document; nothing of the inside leaves; requests are counted."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from lumaris_coordinator import Coordinator, bounds, create_app, problems
from lumaris_coordinator.config import Settings
from lumaris_coordinator.problems import BadDocuments
from lumaris_coordinator.store.writer import Writer
from lumaris_overlay.private_files import load_or_create_key, make_private_folder
from lumaris_protocol.codes import CODES
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party, registration
from tests.coordinator.conftest import open_market

FIELDS = {"type", "title", "status", "detail", "code", "hint", "money_moved", "request_id"}


def check(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert set(found) == FIELDS
    assert (found["status"], found["code"], found["money_moved"]) == (status, code, False)
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["hint"] == CODES[code].hint or found["hint"]


def test_every_status_is_for_a_code_that_exists() -> None:
    assert set(problems.STATUS) <= set(CODES)


async def test_what_the_router_refuses(market: Market) -> None:
    check(await market.client.get("/nothing/here"), 404, "not_found")
    answer = await market.client.get("/v1/grants")
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    check(await market.client.get("/log/consistency?old=a&new=1"), 400, "malformed")


async def test_a_large_body_is_refused_by_its_length_alone(market: Market) -> None:
    async def endless() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-length": str(bounds.BODY_BYTES_MAX + 1)}
    answer = await market.client.post("/v1/settle", content=endless(), headers=headers)
    check(answer, 413, "oversize")
    for bad in ("x", "-1", "9" * 40):
        answer = await market.client.post("/v1/settle", headers={"content-length": bad})
        check(answer, 400, "malformed")


async def test_a_large_body_without_a_length_is_cut_off(market: Market) -> None:
    sent = 0
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 65_536
        return {"type": "http.request", "body": bytes(65_536), "more_body": True}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/settle",
        "raw_path": b"/v1/settle",
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("coordinator", 80),
        "client": ("127.0.0.1", 1),
    }
    await create_app(market.coordinator)(scope, receive, send)
    assert answers[0]["status"] == 413
    assert sent <= bounds.BODY_BYTES_MAX + 65_536


async def test_a_body_that_stalls_is_given_up(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumaris_coordinator.edge.BODY_READ_S_MAX", 0.01)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"x"
        await trio.sleep_forever()

    with trio.fail_after(10):
        check(await market.client.post("/v1/settle", content=stalling()), 408, "timeout")


async def test_a_bug_inside_shows_nothing_of_itself(
    market: Market, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(market.coordinator, "info", broken)
    answer = await market.client.get("/v1/info")
    check(answer, 500, "internal")
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


async def test_a_full_queue_says_when_to_come_back(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = registration(Party("ben"), market.peer, await market.challenge(Party("ben")))
    monkeypatch.setattr(market.coordinator.store.writer, "_queue_max", 0)
    answer = await market.client.post("/v1/identity/register", content=body)
    monkeypatch.undo()
    check(answer, 503, "busy")
    assert answer.headers["retry-after"] == "1"
    assert (await market.client.post("/v1/identity/register", content=body)).status_code == 200


def test_bad_documents_are_logged_once_and_not_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    bad = BadDocuments()
    for number in range(2_000):
        for _ in range(2):
            bad.note(str(number).encode(), LumarisError("malformed"))
    assert len(caplog.records) == bounds.BAD_DOCUMENTS_LOGGED_PER_ROUND_MAX
    bad.new_round()
    bad.note(b"another", LumarisError("malformed"))
    assert len(caplog.records) == bounds.BAD_DOCUMENTS_LOGGED_PER_ROUND_MAX + 1


async def test_requests_are_counted_by_route(market: Market) -> None:
    ann = await market.party("ann")
    for number in range(3):
        await market.client.get(f"/v1/escrows/x{number}", headers=market.bearer(ann))
        await market.client.get(f"/stranger/{number}")
    text = (await market.client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    total = "lumaris_requests_total"
    assert lines[f'{total}{{route="GET /v1/escrows/{{session}}",status="404"}}'] == "3"
    assert lines[f'{total}{{route="other",status="404"}}'] == "3"
    assert lines[f'{total}{{route="POST /v1/identity/register",status="200"}}'] == "1"
    assert int(lines["lumaris_commits_total"]) >= 2
    assert lines["lumaris_queue_depth"] == "0"


async def test_status_and_documentation(market: Market) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await market.client.get(path)).status_code == 200
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert (await market.client.get(path)).status_code == 404
    paths = (await market.client.get("/v1/openapi.json")).json()["paths"]
    assert set(paths) >= {"/v1/grants", "/v1/settle", "/v1/receipts/{receipt}", "/v1/info"}
    assert "requestBody" in paths["/v1/settle"]["post"]
    assert "default" in paths["/v1/settle"]["post"]["responses"]
    schemes = (await market.client.get("/v1/openapi.json")).json()["components"]["securitySchemes"]
    assert set(schemes) == {"bearer"} == set(*paths["/v1/accounts/me"]["get"]["security"])


async def test_not_ready_when_the_store_is_closed(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "alive", False)
    check(await market.client.get("/readyz"), 503, "busy")


async def test_two_coordinators_on_one_directory(market: Market) -> None:
    with pytest.raises(LumarisError, match="already_running"):
        async with open_market(market.coordinator.settings.state):
            pass


async def test_state_of_another_network(tmp_path: Path) -> None:
    async with open_market(tmp_path):
        pass
    with pytest.raises(LumarisError, match="config_invalid"):
        async with Coordinator(Settings(state=tmp_path, network="other")).running():
            pass


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.key"
    key = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path).peer_id == key.peer_id
    assert [file.name for file in tmp_path.iterdir()] == ["coordinator.key"]
    path.chmod(0o644)
    with pytest.raises(LumarisError, match="unsafe_key_file"):
        load_or_create_key(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(LumarisError, match="config_invalid"):
        load_or_create_key(path)
    with pytest.raises(LumarisError, match="not_writable"):
        load_or_create_key(tmp_path / "missing" / "key")


def test_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LumarisError, match="not_writable"):
        make_private_folder(tmp_path / "file" / "state")


@pytest.mark.parametrize(
    "change",
    [
        {"network": "a/b"},
        {"network": ""},
        {"port": 65_536},
        {"fee_bps": 10_001},
        {"fee_bps": -1},
        {"settle_window_s": -1},
        {"test_credit_nanos": 1 << 53},
        {"currencies": ("x",)},
        {"currencies": ()},
        {"currencies": ("EUR", "EUR")},
    ],
)
def test_settings_out_of_range(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(LumarisError, match="config_invalid"):
        Settings(state=tmp_path, **change)  # type: ignore[arg-type]


async def test_random_bytes_everywhere(market: Market) -> None:
    dice = random.Random(20_261)
    routes = ("challenge", "register")
    paths = [f"/v1/identity/{name}" for name in routes] + [
        "/v1/credits",
        "/v1/grants",
        "/v1/settle",
    ]
    for path in paths:
        for _ in range(40):
            body = dice.randbytes(dice.randrange(200))
            answer = await market.client.post(path, content=body)
            assert answer.status_code == 400
            assert json.loads(answer.content)["code"] == "malformed"
    assert (await market.audit())["transfers"] == 0
