"""The other end of the line misbehaves: it does not read, sends a byte at a time, or all at once.

The server is the real one over real sockets; only its patience is shorter.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import h11
import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from lumaris_coordinator import bounds
from lumaris_coordinator.events import hub, outbox, stream
from lumaris_coordinator.server import Protocol
from lumaris_coordinator.store.store import backend_of
from tests.coordinator.builders import Party
from tests.coordinator.served import Served

pytestmark = pytest.mark.slow

PATIENCE_S = 0.1
EVENTS = 600


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("lumaris_coordinator.server.HEAD_S_MAX", PATIENCE_S)
    monkeypatch.setattr("lumaris_coordinator.server.TAKEN_S_MAX", PATIENCE_S)
    monkeypatch.setattr("lumaris_coordinator.edge.BODY_READ_S_MAX", PATIENCE_S)
    monkeypatch.setattr(stream, "EVENTS_SEND_S_MAX", PATIENCE_S)
    monkeypatch.setattr(hub, "EVENTS_POLL_S", 0.01)
    found = Served(tmp_path / "state")
    with found.running():
        yield found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def dial(served: Served) -> socket.socket:
    """A connection whose other end can hold little that nobody reads."""
    url = httpx.URL(served.url)
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    found.connect((url.host, url.port))
    return found


def connections(served: Served) -> int:
    assert served._server is not None
    return len(served._server.server_state.connections)


def answers(served: Served) -> bool:
    return httpx.get(f"{served.url}/healthz").status_code == 200


def request(path: str, *fields: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: coordinator", *fields, "", "")).encode()


def tell_much(served: Served) -> None:
    """More than any buffer on the way holds, for the party that the server knows."""
    settings = served.coordinator.settings
    with closing(backend_of(settings.state, settings.database).writer()) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(EVENTS):
            outbox.emit(
                connection, "escrow.held", ref="b3:00", parties=[Party("ann").peer],
                body={"pad": "x" * 8_000}, now=served.coordinator.context.now(),
            )  # fmt: skip
        connection.execute("COMMIT")


def test_a_reader_that_takes_nothing_is_let_go_and_holds_up_nobody(served: Served) -> None:
    bearer = f"Authorization: Bearer {served.token}"
    upgrade = (
        "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )  # fmt: skip
    tell_much(served)
    with dial(served) as events, dial(served) as web_socket:
        events.sendall(request("/v1/events?after=0", bearer))
        web_socket.sendall(request("/v1/stream?after=0", bearer, *upgrade))
        assert (events.recv(1), web_socket.recv(1)) == (b"H", b"H")
        headers = {"authorization": f"Bearer {served.token}"}
        seen = 0
        with httpx.stream("GET", f"{served.url}/v1/events?after=0", headers=headers) as good:
            for line in good.iter_lines():
                seen += line.startswith("id: ")
                if seen == EVENTS:
                    break
        until(lambda: served.coordinator.events.streams == 0)
        until(lambda: connections(served) == 0)
        assert answers(served)


@pytest.mark.parametrize("taken", [0, 256])
def test_answers_that_nobody_reads_do_not_keep_a_connection(served: Served, taken: int) -> None:
    """Many requests in one go; of the answers nothing is taken, or a few bytes now and then."""
    with dial(served) as greedy:
        greedy.sendall(request("/v1/openapi.json") * 100)
        until(lambda: connections(served) == 1)
        deadline = time.monotonic() + 5
        while connections(served):
            assert time.monotonic() < deadline
            if taken:
                greedy.recv(taken)
            time.sleep(PATIENCE_S / 10)
        assert answers(served)


class Trickle(asyncio.Transport):
    """A line from whose full buffer some bytes go now and then, and never enough."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent, self.aborted = 70_000, False

    def get_write_buffer_size(self) -> int:
        self.unsent -= 1
        return self.unsent

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("resumed", [True, False])
def test_a_buffer_that_stays_full_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    monkeypatch.setattr("lumaris_coordinator.server.TAKEN_S_MAX", 0.0)

    async def nothing(_scope: object, _receive: object, _send: object) -> None:
        """Never asked."""

    async def look() -> bool:
        found = Protocol(uvicorn.Config(nothing, http=Protocol, log_config=None), ServerState(), {})
        found.transport = line = Trickle()
        found.flow = FlowControl(line)
        found.pause_writing()
        if resumed:
            found.resume_writing()
        found._look_at_unsent(line.unsent)
        if found._taking is not None:
            found._taking.cancel()
        return line.aborted

    assert asyncio.run(look()) is not resumed


def test_pipelined_requests_are_answered_in_their_order(served: Served) -> None:
    with dial(served) as found:
        found.sendall(request("/v1/info") + request("/nowhere") + request("/healthz"))
        data = b""
        while data.count(b"HTTP/1.1 ") < 3:
            part = found.recv(65_536)
            assert part, data
            data += part
    statuses = [part.split(b" ", 1)[0] for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"]


CHUNKED = "Transfer-Encoding: chunked"
# A head's fields and a body whose length can be read in two ways.
SMUGGLED = (
    (CHUNKED, b"0x3\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"+3\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"-3\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b" 3\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"3\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"3\r\nabc0\r\n\r\n"),
    (CHUNKED, b"3\r\nabcdef\r\n0\r\n\r\n"),
    (CHUNKED, b"\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"3;a\nb\r\nabc\r\n0\r\n\r\n"),
    (CHUNKED, b"ffffffffffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    ("Content-Length: 3\r\nContent-Length: 4", b"abcd"),
    ("Content-Length: 3, 4", b"abcd"),
    ("Content-Length: +3", b"abc"),
    ("Content-Length: 0x3", b"abc"),
    ("Content-Length : 3", b"abc"),
    (f"{CHUNKED}, identity", b"3\r\nabc\r\n0\r\n\r\n"),
    ("Transfer-Encoding: xchunked", b"3\r\nabc\r\n0\r\n\r\n"),
    ("Transfer-Encoding : chunked", b"3\r\nabc\r\n0\r\n\r\n"),
    ("X-A: a\rContent-Length: 3", b"abc"),
)
FRAMED = ((CHUNKED, b"3;a=b\r\nabc\r\n0\r\n\r\n"), ("Content-Length: 3", b"abc"))


def taken_by_h11(data: bytes) -> bool:
    """Whether another parser finds a whole request in it."""
    connection = h11.Connection(h11.SERVER)
    try:
        connection.receive_data(data)
        while (event := connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.EndOfMessage):
                return True
    except h11.RemoteProtocolError:
        pass
    return False


def test_what_another_parser_does_not_take_is_refused(served: Served) -> None:
    """A proxy in front of us and we must find the same requests in the same bytes."""
    for fields, body in SMUGGLED + FRAMED:
        data = request("/healthz", fields, "Connection: close") + body
        with dial(served) as found:
            found.sendall(data)
            answer = b""
            while part := found.recv(65_536):
                answer += part
        refused = answer.startswith(b"HTTP/1.1 400 ")
        assert refused is not taken_by_h11(data), (fields, body)
        assert refused or answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_byte_at_a_time_does_not_keep_a_connection(served: Served, part: str) -> None:
    head = request("/v1/settle", "Content-Length: 1000").replace(b"GET", b"POST")
    with dial(served) as slow:
        slow.sendall(head[:20] if part == "head" else head)
        until(lambda: connections(served) == 1)
        left = iter(head[20:] if part == "head" else b"x" * 1_000)
        try:
            while connections(served):
                slow.sendall(bytes([next(left)]))
                time.sleep(PATIENCE_S / 5)
        except (BrokenPipeError, ConnectionResetError):
            pass
        until(lambda: connections(served) == 0)
        assert answers(served)


@pytest.mark.parametrize("length", [True, False])
def test_a_body_without_end_is_cut_off(served: Served, length: bool) -> None:
    field = (
        f"Content-Length: {2 * bounds.BODY_BYTES_MAX}" if length else "Transfer-Encoding: chunked"
    )
    head = request("/v1/settle", field).replace(b"GET", b"POST")
    chunk = b"x" * 65_536 if length else b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    with dial(served) as flood:
        flood.settimeout(20)
        flood.sendall(head)
        sent = 0
        try:
            while sent < 64:
                flood.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        until(lambda: connections(served) == 0)
    assert sent * 65_536 < 2 * bounds.BODY_BYTES_MAX + 8 * 1024 * 1024
    assert answers(served)
    assert json.loads(httpx.get(f"{served.url}/readyz").content)["ready"]
