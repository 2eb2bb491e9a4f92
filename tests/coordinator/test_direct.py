"""The short way answers as the framework's way does, whatever is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fastapi import FastAPI
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from lumaris_coordinator import app, create_app, edge
from lumaris_coordinator.bounds import BODY_BYTES_MAX
from lumaris_coordinator.direct import Direct
from lumaris_coordinator.escrow.routes import router
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party
from tests.coordinator.conftest import open_market

STRANGER = "203.0.113.9"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# New for every request, whichever way it goes.
_OWN = ("x-request-id", "traceparent")
PATHS = ("/v1/grants", "/v1/amendments", "/v1/settle")


def without(application: ASGIApp, **_: Any) -> ASGIApp:
    """In place of the short way: nothing."""
    return application


@dataclass
class Ways:
    """One coordinator behind two apps, of which the second has no short way."""

    market: Market
    apps: tuple[FastAPI, FastAPI]

    async def ask(
        self, method: str, path: str, *, address: str = "127.0.0.1", **request: Any
    ) -> tuple[httpx.Response, httpx.Response]:
        """The answers of both."""
        found = []
        for one in self.apps:
            transport = httpx.ASGITransport(one, client=(address, 1), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://c") as client:
                found.append(await client.request(method, path, **request))
        return found[0], found[1]


@pytest.fixture
async def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ways]:
    async with open_market(tmp_path / "state", address_rate=1.0) as market:
        monkeypatch.setattr(app, "Direct", without)
        longer = create_app(market.coordinator)
        monkeypatch.undo()
        yield Ways(market, (create_app(market.coordinator), longer))


def same(answers: tuple[httpx.Response, httpx.Response]) -> httpx.Response:
    """That both are one answer, but for what is new in each."""
    for answer in answers:
        assert len(answer.headers["x-request-id"]) == 16
        assert answer.headers["traceparent"].startswith("00-")
    told = []
    for answer in answers:
        headers = sorted(item for item in answer.headers.multi_items() if item[0] not in _OWN)
        told.append((answer.status_code, headers, words(answer)))
    assert told[0] == told[1]
    return answers[0]


def words(answer: httpx.Response) -> object:
    if answer.headers["content-type"] != "application/problem+json":
        return answer.content
    problem = answer.json()
    assert problem.pop("request_id") == answer.headers["x-request-id"]
    return problem


def routes_counted(market: Market) -> set[tuple[str, int]]:
    return set(market.coordinator.metrics.requests)


async def speak(application: ASGIApp, path: str, *parts: bytes) -> tuple[int, Any]:
    """Send a body that does not end, as a server hands it over; the status and the problem."""
    told: list[Any] = []
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if not left:
            await trio.sleep_forever()
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    async def send(message: Any) -> None:
        told.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": b"",
        "query_string": b"", "root_path": "", "headers": [], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await application(scope, receive, send)
    problem = json.loads(told[1]["body"])
    del problem["request_id"]
    return told[0]["status"], problem


def test_the_routes_that_are_served_the_short_way() -> None:
    served = set(Direct(Router(), router.routes)._routes)
    assert served == {("POST", path) for path in PATHS}


async def test_a_session_is_answered_alike(ways: Ways) -> None:
    market = ways.market
    buyer, seller = await market.party("ann", 10**9), await market.party("bob")
    deal = market.deal(buyer, seller)
    granted = same(await ways.ask("POST", "/v1/grants", content=deal.grant_request()))
    assert granted.status_code == 200
    more = deal.amend_request(1, cap=deal.cap + 1_000_000)
    amended = same(await ways.ask("POST", "/v1/amendments", content=more))
    assert amended.status_code == 200
    waits = deal.claim(buyer, amended.content, 2_000)
    assert same(await ways.ask("POST", "/v1/settle", content=waits)).status_code == 202
    claim = deal.claim(seller, granted.content, 3_000)
    headers = {"content-type": "text/plain", "traceparent": TRACE, "cookie": "a=b"}
    short, longer = await ways.ask("POST", "/v1/settle?a=b", content=claim, headers=headers)
    assert same((short, longer)).status_code == 200
    assert short.headers["traceparent"].startswith(TRACE[:36])
    assert longer.headers["traceparent"].startswith(TRACE[:36])
    late = deal.claim(buyer, granted.content, 3_000)
    assert same(await ways.ask("POST", "/v1/settle", content=late)).content == short.content
    assert ("POST /v1/settle", 200) in routes_counted(market)
    assert ("other", 200) not in routes_counted(market)


BAD: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "", {"content": b"junk"}, 400),
    ("POST", "", {}, 400),
    ("POST", "", {"content": b"", "headers": {"content-length": "9" * 20}}, 400),
    ("POST", "", {"content": b"", "headers": {"content-length": str(10**9)}}, 413),
    ("POST", "x", {"content": b"junk"}, 404),
    ("GET", "", {}, 405),
    ("OPTIONS", "", {}, 405),
    ("PATCH", "", {"content": b"junk"}, 405),
]  # fmt: skip


async def test_a_bad_request_is_refused_alike(ways: Ways) -> None:
    for path in PATHS:
        for method, more, request, status in BAD:
            answer = same(await ways.ask(method, path + more, **request))
            assert answer.status_code == status, (method, path, request)
        for answer in await ways.ask("POST", path + "/", content=b"junk"):
            assert answer.status_code == 307
            assert answer.headers["location"] == f"http://c{path}"


async def test_a_body_that_does_not_end_is_refused_alike(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "BODY_READ_S_MAX", 0.01)
    large = [b"x" * (BODY_BYTES_MAX // 2)] * 3
    for path in PATHS:
        for parts, code in (([b"x"], "timeout"), (large, "oversize")):
            short, longer = [await speak(one, path, *parts) for one in ways.apps]
            assert short == longer
            assert short[1]["code"] == code


async def test_rates_are_counted_alike(ways: Ways) -> None:
    found = []
    for _ in range(4):  # one a second, five at once: of both together
        answers = await ways.ask("POST", "/v1/settle", address=STRANGER, content=b"junk")
        found += [(one.status_code, one.headers["ratelimit"]) for one in answers]
    assert [status for status, _ in found] == [400] * 5 + [429] * 3
    assert [told.partition(";")[2].partition(";")[0] for _, told in found[:5]] == [
        f"r={left}" for left in (4, 3, 2, 1, 0)
    ]
    refused = await ways.ask("POST", "/v1/settle", address=STRANGER, content=b"junk")
    assert same(refused).json()["code"] == "rate_limited"
    assert int(refused[0].headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LumarisError("busy"), 503),
        (LumarisError("rate_limited", "slow"), 429),
        (RuntimeError("a secret"), 500),
        (KeyError("a secret"), 500),
    ],
)
async def test_a_failure_is_told_alike(
    ways: Ways,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
) -> None:
    async def fail(_body: bytes) -> bytes:
        raise error

    monkeypatch.setattr(ways.market.coordinator.grants, "grant", fail)
    short = same(await ways.ask("POST", "/v1/grants", content=b"x"))
    assert short.status_code == status
    assert "secret" not in short.text
    assert ("retry-after" in short.headers) == (status == 503)
    assert ("POST /v1/grants", status) in routes_counted(ways.market)
    assert caplog.text.count("Traceback") == (2 if status == 500 else 0)


async def test_mutual_tls_asks_before_the_short_way(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tls_names": ("localhost",), "mutual_tls": True}
    async with open_market(tmp_path / "state", **settings) as market:
        for path in PATHS:
            answer = await market.client.post(path, content=b"junk")
            assert answer.json()["code"] == "certificate_needed"


async def test_a_bad_document_is_logged_alike(ways: Ways, caplog: pytest.LogCaptureFixture) -> None:
    for way, content in zip(ways.apps, (b"one", b"two"), strict=True):
        transport = httpx.ASGITransport(way)
        async with httpx.AsyncClient(transport=transport, base_url="http://c") as client:
            for _ in range(2):
                await client.post("/v1/settle", content=content)
    assert len([line for line in caplog.messages if line.startswith("bad document")]) == 2


async def test_a_mounted_app_goes_the_framework_way() -> None:
    reached: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            reached.append(name)

        return serve

    direct = Direct(noting("framework"), router.routes)
    for scope in (
        {"type": "lifespan"},
        {"type": "websocket", "path": "/v1/settle"},
        {"type": "http", "method": "POST", "path": "/v1/settle", "root_path": "/x"},
        {"type": "http", "method": "POST", "path": "/v1/settle/", "root_path": ""},
    ):
        await direct(scope, noting("receive"), noting("send"))
    assert reached == ["framework"] * 4


async def test_the_description_is_the_same(ways: Ways) -> None:
    short, longer = ways.apps
    assert short.openapi() == longer.openapi()


async def test_the_parties_are_still_the_only_ones(ways: Ways) -> None:
    market = ways.market
    buyer, seller = await market.party("ann", 10**9), await market.party("bob")
    deal = market.deal(buyer, seller)
    grant = await market.grant(deal)
    eve = Party("eve")
    forged = deal.claim(seller, grant, 3_000, signer=eve)
    assert same(await ways.ask("POST", "/v1/settle", content=forged)).json()["code"] == (
        "wrong_signer"
    )
