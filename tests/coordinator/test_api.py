"""What holds for every route: tracing, log lines, conditional requests, health and metrics."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from starlette.requests import Request

from lumaris_coordinator import logs
from lumaris_coordinator.conditional import answer, etag_of, require_match
from lumaris_coordinator.metrics import Histogram
from lumaris_coordinator.tracing import trace_of
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market
from tests.coordinator.test_events import tell

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def test_a_trace_goes_on_and_comes_back(market: Market) -> None:
    sent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    told = (await market.client.get("/healthz", headers=sent)).headers["traceparent"]
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-01", told)
    assert SPAN not in told
    fresh = (await market.client.get("/healthz")).headers["traceparent"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", fresh)
    refused = await market.client.get("/v1/users/me", headers=sent)
    assert TRACE in refused.headers["traceparent"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 300,
    ],
)
def test_what_is_no_traceparent_begins_a_trace(header: str | None) -> None:
    found = trace_of(header)
    assert found.trace_id != TRACE
    assert found.parent == ""


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    found = trace_of(f"01-{TRACE}-{SPAN}-01-more")
    assert (found.trace_id, found.parent, found.flags) == (TRACE, SPAN, "00")


async def test_a_requests_line_names_its_route_and_no_secret(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    ann = await market.party("ann")
    caplog.set_level(logging.INFO, logger=logs.ACCESS.name)
    headers = {**market.bearer(ann), "traceparent": f"00-{TRACE}-{SPAN}-01"}
    answered = await market.client.get("/v1/escrows/ses_x?token=hidden", headers=headers)
    (record,) = [found for found in caplog.records if found.name == logs.ACCESS.name]
    fields = record.__dict__["fields"]
    assert fields.pop("ms") >= 0
    assert fields == {
        "method": "GET",
        "route": "/v1/escrows/{session}",
        "status": 404,
        "request_id": answered.headers["x-request-id"],
        "trace_id": TRACE,
    }
    line = logs.JsonLines().format(record)
    assert json.loads(line)["route"] == "/v1/escrows/{session}"
    assert market.tokens["ann"] not in line
    assert "hidden" not in line
    assert "route=/v1/escrows/{session} status=404" in logs.TextLines().format(record)


async def test_no_line_for_requests_unless_asked(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    await market.client.get("/healthz")
    assert [found for found in caplog.records if found.name == logs.ACCESS.name] == []


def record_of(message: str, **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "a", "levelname": "WARNING", "msg": message, **more})


def test_a_message_cannot_pass_for_another_line() -> None:
    forged = record_of('one\r\n{"level": "error"}\u2028two')
    for formatter in (logs.JsonLines(), logs.TextLines()):
        assert len(formatter.format(forged).splitlines()) == 1
    try:
        raise ValueError("no")
    except ValueError as error:
        failed = record_of("failed", exc_info=(ValueError, error, error.__traceback__))
    assert "ValueError: no" in json.loads(logs.JsonLines().format(failed))["exception"]
    assert len(logs.JsonLines().format(failed).splitlines()) == 1
    assert "ValueError: no" in logs.TextLines().format(failed)


def test_the_form_of_the_log_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    level, access = root.level, logs.ACCESS.level
    try:
        logs.configure(form="json", requests=True)
        assert isinstance(root.handlers[0].formatter, logs.JsonLines)
        assert logs.ACCESS.isEnabledFor(logging.INFO)
        logs.configure(form="text", requests=False)
        assert isinstance(root.handlers[0].formatter, logs.TextLines)
        assert not logs.ACCESS.isEnabledFor(logging.INFO)
    finally:
        root.setLevel(level)
        logs.ACCESS.setLevel(access)


def asking(**headers: str) -> Request:
    found = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "headers": found})


def test_conditional_requests() -> None:
    value = {"a": 1}
    tag = etag_of(value)
    assert answer(asking(), value).headers["etag"] == tag
    for known in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        assert answer(asking(if_none_match=known), value).status_code == 304
    assert answer(asking(if_none_match='"x"'), value).status_code == 200
    assert answer(asking(if_none_match=tag), {"a": 2}).status_code == 200
    for held in (tag, "*", f'"x",{tag}'):
        require_match(asking(if_match=held), tag)
    require_match(asking(), tag)
    for other in ('"x"', f"W/{tag}", ""):  # a weak tag never matches strongly
        with pytest.raises(LumarisError, match="precondition_failed"):
            require_match(asking(if_match=other), tag)


def test_a_histogram_counts_up_to_each_bound() -> None:
    found = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 9):
        found.add(value)
    assert found.lines("x") == [
        "# TYPE x histogram",
        'x_bucket{le="1"} 2',
        'x_bucket{le="2"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 12.000000",
        "x_count 4",
    ]


async def test_what_the_metrics_tell(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumaris_coordinator.gauges.METRICS_KEPT_S", 0)
    buyer, seller = await market.party("buyer", 50_000_000), await market.party("seller")
    await market.grant(market.deal(buyer, seller))
    newest = await tell(market, buyer)
    await market.coordinator.events.pump()
    text = (await market.client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    expected = {
        "up": "1",
        "unbalanced": "0",
        "escrows_open": "1",
        "timer_overdue_seconds": "0",
        "events_head": str(newest),
        "events_handed_out": str(newest),
        "event_streams": "0",
        "webhooks": "0",
        "queue_depth": "0",
    }
    assert {name: lines[f"lumaris_{name}"] for name in expected} == expected
    commits = int(lines["lumaris_commits_total"])
    assert lines["lumaris_commit_seconds_count"] == str(commits)
    assert lines["lumaris_batch_operations_count"] == str(commits)
    assert float(lines["lumaris_batch_operations_sum"]) == int(lines["lumaris_operations_total"])
    assert "lumaris_witnesses" in lines
    assert "lumaris_log_size" in lines
    market.clock.now += 10**9
    text = (await market.client.get("/metrics")).text
    assert "lumaris_timer_overdue_seconds 0" not in text


async def test_the_database_is_asked_for_gauges_now_and_then_only(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    await market.client.get("/metrics")

    async def never(look: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(market.coordinator.store, "scan", never)
    assert (await market.client.get("/metrics")).status_code == 200
