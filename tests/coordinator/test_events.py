"""The outbox and its streams: in order, each once, only one's own, and from where one left."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import trio

from lumaris_coordinator import create_app
from lumaris_coordinator.events import hub as hub_module
from lumaris_coordinator.events import outbox, routes, stream
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party


async def tell(market: Market, *parties: Party, number: int = 1, kind: str = "escrow.held") -> int:
    """Some events in one transaction; the last one's id."""

    def operation(connection: Connection) -> int:
        last = 0
        for n in range(number):
            last = outbox.emit(
                connection,
                kind,
                ref="b3:00",
                parties=[party.peer for party in parties],
                body={"n": n},
                now=market.now,
            )
        return last

    return await market.coordinator.store.submit(operation)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not holds():
            await trio.sleep(0.001)


@dataclass
class Wire:
    """One ASGI connection that a test holds the other end of."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    inbox: list[dict[str, Any]] = field(default_factory=list)
    arrived: trio.Event = field(default_factory=trio.Event)
    stalled: bool = False
    done: bool = False

    async def receive(self) -> dict[str, Any]:
        while not self.inbox:
            await self.arrived.wait()
            self.arrived = trio.Event()
        return self.inbox.pop(0)

    async def send(self, message: Any) -> None:
        if self.stalled:
            await trio.sleep_forever()
        self.sent.append(message)

    def say(self, message: dict[str, Any]) -> None:
        self.inbox.append(message)
        self.arrived.set()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events that came, over whichever of the two."""
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        lines += [message["text"] for message in self.sent if message.get("text")]
        return [found for found in map(json.loads, lines) if "id" in found]

    @property
    def ids(self) -> list[int]:
        return [event["id"] for event in self.events]


# Making one takes longer than most of what is asked of it.
_app_of = lru_cache(maxsize=1)(create_app)


@asynccontextmanager
async def connect(
    market: Market, path: str, *, query: str = "", kind: str = "http", **headers: str
) -> AsyncIterator[Wire]:
    """A stream that goes away at the end of the block."""
    wire = Wire()
    scope = {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http" if kind == "http" else "ws",
        "query_string": query.encode(),
        "headers": [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("coordinator", 80),
        "subprotocols": [],
    }
    wire.say({"type": "http.request"} if kind == "http" else {"type": "websocket.connect"})

    async def serve() -> None:
        await _app_of(market.coordinator)(scope, wire.receive, wire.send)
        wire.done = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield wire
        wire.say({"type": f"{'http' if kind == 'http' else 'websocket'}.disconnect"})
        await until(lambda: wire.done)
        nursery.cancel_scope.cancel()


def sse(market: Market, party: Party, query: str = "", **headers: str) -> Any:
    return connect(market, "/v1/events", query=query, **market.bearer(party), **headers)


def socket(market: Market, party: Party, query: str = "") -> Any:
    return connect(market, "/v1/stream", query=query, kind="websocket", **market.bearer(party))


BOTH = pytest.mark.parametrize("opened", [sse, socket])


async def test_ids_have_no_gaps_and_cannot_be_rewritten(market: Market) -> None:
    ann = await market.party("ann")
    assert await tell(market, ann, number=3) == 3

    def failing(connection: Connection) -> None:
        outbox.emit(connection, "escrow.held", ref="x", parties=[ann.peer], body={}, now=1)
        raise ValueError

    with pytest.raises(ValueError):
        await market.coordinator.store.submit(failing)
    assert await tell(market, ann) == 4
    rows = await market.coordinator.store.read(
        lambda connection: all_rows(connection, "SELECT id FROM event ORDER BY id")
    )
    assert [row[0] for row in rows] == [1, 2, 3, 4]


async def test_pages_hold_ones_own_events_only(market: Market) -> None:
    ann, bob, eve = [await market.party(name) for name in ("ann", "bob", "eve")]
    await tell(market, ann, bob, number=3)
    await tell(market, bob, number=2)
    await tell(market, ann)

    async def page(party: Party, **query: int) -> tuple[list[int], int | None]:
        answer = await market.client.get(
            "/v1/events/page", params=query, headers=market.bearer(party)
        )
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return [event["id"] for event in found["events"]], found["next"]

    assert await page(ann) == ([1, 2, 3, 6], None)
    assert await page(ann, limit=2) == ([1, 2], 2)
    assert await page(ann, limit=2, after=2) == ([3, 6], None)
    assert await page(bob, after=3) == ([4, 5], None)
    assert await page(eve) == ([], None)
    answer = await market.client.get("/v1/events/page", headers=market.bearer(ann))
    event = answer.json()["events"][0]
    assert event == {
        "id": 1,
        "type": "escrow.held",
        "at": market.now,
        "ref": "b3:00",
        "data": {"n": 0},
    }
    assert bob.peer not in answer.text
    for bad in ("after=-1", "after=x", "limit=0", "limit=101"):
        answer = await market.client.get(f"/v1/events/page?{bad}", headers=market.bearer(ann))
        assert answer.status_code == 400
    assert (await market.client.get("/v1/events/page")).status_code == 401


@BOTH
async def test_a_stream_gives_the_past_then_the_present(market: Market, opened: Any) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    await tell(market, ann, number=250)
    await tell(market, bob, number=5)
    async with opened(market, ann, "after=10") as wire:
        await until(lambda: len(wire.ids) == 240)
        await tell(market, bob, ann)
        await tell(market, bob)
        await tell(market, ann, number=2)
        await until(lambda: len(wire.ids) == 243)
        assert wire.ids == [*range(11, 251), 256, 258, 259]
    assert market.coordinator.events.streams == 0
    async with opened(market, ann) as wire:  # without a cursor: from now on
        await until(lambda: bool(wire.sent))
        await until(lambda: bool(market.coordinator.events._by_party))
        newest = await tell(market, ann)
        await until(lambda: wire.ids == [newest])


async def test_an_event_source_resumes_by_its_header(market: Market) -> None:
    ann = await market.party("ann")
    await tell(market, ann, number=3)
    async with sse(market, ann, "after=0", last_event_id="2") as wire:
        await until(lambda: wire.ids == [3])
        assert "id: 3\nevent: escrow.held\ndata: {" in wire.text
        assert wire.text.startswith(": alive\n\n")
    for bad in ("x", "-1", "9" * 19, "9" * 400):
        headers = {**market.bearer(ann), "last-event-id": bad}
        answer = await market.client.get("/v1/events", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


@BOTH
async def test_a_reader_that_lags_is_let_go_with_its_place(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await market.party("ann")
    monkeypatch.setattr(hub_module, "EVENTS_LAG_MAX", 4)
    async with opened(market, ann, "after=0") as wire:
        await until(lambda: bool(market.coordinator.events._by_party))
        await tell(market, ann, number=5)  # handed out in one go, so nobody can read in between
        await until(lambda: wire.done)
    if opened is sse:
        assert wire.text.endswith('id: 0\nevent: end\ndata: {"reason":"lagging","after":0}\n\n')
    else:
        close = wire.sent[-1]
        assert (close["code"], close["reason"]) == (1013, "lagging after=0")


@BOTH
async def test_a_reader_that_does_not_read_is_given_up(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "EVENTS_SEND_S_MAX", 0.01)
    ann = await market.party("ann")
    async with opened(market, ann, "after=0") as wire:
        await until(lambda: bool(market.coordinator.events._by_party))
        wire.stalled = True
        await tell(market, ann)
        await until(lambda: wire.done)
    assert market.coordinator.events.streams == 0


@BOTH
async def test_silence_has_signs_of_life_and_credentials_are_checked_again(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "EVENTS_HEARTBEAT_S", 0.005)
    ann = await market.party("ann")
    async with opened(market, ann) as wire:
        await until(lambda: str(wire.sent).count("alive") >= 3)
        market.clock.now += 30 * 24 * 3600  # the token ends
        await until(lambda: wire.done)
    assert "unauthorized" in str(wire.sent[-1])


@BOTH
async def test_a_stream_ends_in_time_and_with_the_coordinator(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await market.party("ann")
    async with opened(market, ann) as wire:
        await until(lambda: bool(market.coordinator.events._by_party))
        market.coordinator.events.close()
        await until(lambda: wire.done)
    assert "restarting" in str(wire.sent[-1])
    market.coordinator.events.closing = False
    monkeypatch.setattr(stream, "EVENTS_STREAM_S_MAX", 0.0)
    async with opened(market, ann, "after=0") as wire:
        await tell(market, ann)
        await until(lambda: wire.done)
    assert "resume" in str(wire.sent[-1])


async def test_streams_are_counted_per_account_and_in_all(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    monkeypatch.setattr(hub_module, "EVENT_STREAMS_PER_PRINCIPAL_MAX", 1)
    async with sse(market, ann) as wire:
        await until(lambda: bool(wire.sent))
        answer = await market.client.get("/v1/events", headers=market.bearer(ann))
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many")
        monkeypatch.setattr(hub_module, "EVENT_STREAMS_MAX", 1)
        answer = await market.client.get("/v1/events", headers=market.bearer(bob))
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
        async with socket(market, bob) as refused:
            await until(lambda: refused.done)
        assert refused.sent[-1]["code"] == 1013
    assert market.coordinator.events.streams == 0


async def test_a_socket_may_send_its_token_first(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await market.party("ann")
    await tell(market, ann)
    hello = json.dumps({"token": market.tokens["ann"]})
    async with connect(market, "/v1/stream", kind="websocket", query="after=0") as wire:
        wire.say({"type": "websocket.receive", "text": hello})
        await until(lambda: wire.ids == [1])
    for text, code in (
        ("{}", "malformed"),
        ('{"token":"lum_x"}', "unauthorized"),
        ("[" * 900, "m"),
    ):
        async with connect(market, "/v1/stream", kind="websocket") as wire:
            wire.say({"type": "websocket.receive", "text": text})
            await until(lambda: wire.done)
        assert wire.sent[-1]["code"] == 1008
        assert wire.sent[-1]["reason"].startswith(code)
    monkeypatch.setattr("lumaris_coordinator.events.routes.EVENTS_HELLO_S_MAX", 0.01)
    async with connect(market, "/v1/stream", kind="websocket") as wire:
        await until(lambda: wire.done)
    assert wire.sent[-1]["reason"] == "unauthorized"


async def test_a_lost_wake_up_only_delays(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "EVENTS_POLL_S", 0.01)
    monkeypatch.setattr(market.coordinator.store.bus, "wake", lambda: None)
    ann = await market.party("ann")
    async with sse(market, ann, "after=0") as wire:
        await until(lambda: bool(market.coordinator.events._by_party))
        newest = await tell(market, ann)
        await until(lambda: wire.ids == [newest])


@BOTH
async def test_streams_of_one_address_are_few(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer costs nothing, so a count for each of them bounds nobody."""
    ann, bob = await market.party("ann"), await market.party("bob")
    hub = market.coordinator.events
    monkeypatch.setattr(hub_module, "EVENT_STREAMS_PER_ADDRESS_MAX", 1)
    monkeypatch.setattr(routes, "known_address", lambda request: "192.0.2.1")
    async with opened(market, ann) as wire:
        await until(lambda: hub.streams == 1)
        answer = await market.client.get("/v1/events", headers=market.bearer(bob))
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many")
        async with socket(market, bob) as refused:
            await until(lambda: refused.done)
        assert refused.sent[-1]["code"] == 1013
        monkeypatch.setattr(routes, "known_address", lambda request: "192.0.2.2")
        async with opened(market, bob):
            await until(lambda: hub.streams == 2)
        assert not wire.done
    assert hub.streams == 0
    assert not hub._addresses


@BOTH
async def test_a_store_that_cannot_be_asked_sends_nobody_away_for_good(
    market: Market, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "EVENTS_HEARTBEAT_S", 0.005)
    ann = await market.party("ann")

    async def busy(authorization: str) -> None:
        raise LumarisError("busy", "The store does not answer.")

    async with opened(market, ann) as wire:
        await until(lambda: bool(market.coordinator.events._by_party))
        monkeypatch.setattr(market.coordinator.identity, "authenticate", busy)
        await until(lambda: wire.done)
    if opened is socket:
        close = wire.sent[-1]
        assert (close["code"], close["reason"]) == (1013, "busy after=0")
    else:
        assert '"reason":"busy"' in wire.text
