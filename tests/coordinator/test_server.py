"""Connections that never ask are closed; those that wait for an answer are not."""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from lumaris_coordinator.bounds import LOCAL_CONNECTIONS_KEPT
from lumaris_coordinator.server import Protocol, Server, protocol_behind

HEAD = b"GET / HTTP/1.1\r\nHost: coordinator\r\n"


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after twice the time in which a head must arrive."""
    await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def with_server(
    talk: Callable[[Reader, Writer], Awaitable[None]],
    *,
    app: Any = slow_app,
    closing: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Run a conversation with a server on a port of the system's choice."""

    async def serve() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            options.setdefault("http", Protocol)
            config = uvicorn.Config(app, lifespan="off", log_config=None, **options)
            server = Server(config, ready="ready", closing=closing)
            running = asyncio.create_task(server.serve(sockets=[listener]))
            async with asyncio.timeout(10):
                while not server.started:
                    await asyncio.sleep(0.001)
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await talk(reader, writer)
                writer.close()
                await writer.wait_closed()
                server.should_exit = True
                await running

    asyncio.run(serve())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", HEAD])
def test_a_connection_without_a_whole_head_is_closed(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("lumaris_coordinator.server.HEAD_S_MAX", 0.05)

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(sent)
        assert await reader.read() == b""

    with_server(talk)


@pytest.mark.slow
def test_a_slow_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lumaris_coordinator.server.HEAD_S_MAX", 0.05)

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(HEAD + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 204")

    with_server(talk)
    assert capsys.readouterr().out == "ready\n"


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, then answers; accepts a WebSocket and says one word."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "here"})
        await receive()
        return
    while (await receive()).get("more_body"):
        pass
    await slow_app(scope, receive, send)


def problem_in(answer: bytes) -> tuple[int, dict[str, Any]]:
    """(status, problem document) of a whole answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    found: dict[str, Any] = json.loads(body)
    assert f"x-request-id: {found['request_id']}".encode() in head.lower()
    return int(head.split()[1]), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD + b"X-Pad: " + b"x" * 33_000 + b"\r\n\r\n", 431, "oversize"),
        (HEAD + b"X-Pad: x\r\n" * 4_000 + b"\r\n", 431, "oversize"),
        (b"GET /" + b"x" * 33_000 + b" HTTP/1.1\r\nHost: c\r\n\r\n", 431, "oversize"),
        (HEAD + b"X-Pad: x\r\n" * 4_000, 431, "oversize"),  # and the head does not end
        (HEAD + b"X-Pad: " + b"x" * 200_000, 431, "oversize"),
        (b"\x16\x03\x01 hello", 400, "malformed"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "malformed"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "malformed"),
    ],
)
def test_a_head_that_is_refused_is_answered_with_a_problem(
    sent: bytes, status: int, code: str
) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(sent)
        found = problem_in(await reader.read())
        assert (found[0], found[1]["status"], found[1]["code"]) == (status, status, code)

    with_server(talk, app=echo_app)


@pytest.mark.slow
def test_endless_trailers_end_the_connection() -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        head = HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
        writer.write(head + b"X-Pad: x\r\n" * 4_000)
        assert await reader.read() == b""

    with_server(talk, app=echo_app)


@pytest.mark.slow
def test_connections_beyond_the_bound_are_told_so() -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        address = writer.get_extra_info("peername")
        second_reader, second = await asyncio.open_connection(*address)
        second.write(HEAD + b"\r\n")
        status, found = problem_in(await second_reader.read())
        assert (status, found["code"]) == (503, "busy")
        second.close()
        third_reader, third = await asyncio.open_connection(*address)
        third.write(UPGRADE)
        assert (await third_reader.read()).startswith(b"HTTP/1.1 503 ")
        third.close()

    with_server(talk, app=echo_app, limit_concurrency=1)


UPGRADE = (
    HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.mark.slow
def test_a_websocket_outlives_the_time_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumaris_coordinator.server.HEAD_S_MAX", 0.02)

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(UPGRADE)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(6) == b"\x81\x04here"
        with pytest.raises(TimeoutError):  # three times that long nothing ends it
            await asyncio.wait_for(reader.read(1), 0.06)

    with_server(talk, app=echo_app, ws="wsproto")


@pytest.mark.slow
def test_streams_are_told_before_the_server_ends() -> None:
    told: list[bool] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        assert not told

    with_server(talk, app=echo_app, closing=lambda: told.append(True))
    assert told == [True]


async def quick_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def of_elsewhere(monkeypatch: pytest.MonkeyPatch, *, most: int) -> None:
    """Let the connections of a test come from one address of a stranger, which may have so many."""
    monkeypatch.setattr("lumaris_coordinator.server.counted_as", lambda address: "192.0.2.1")
    monkeypatch.setattr("lumaris_coordinator.server.CONNECTIONS_PER_ADDRESS_MAX", most)


def test_an_address_has_so_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    of_elsewhere(monkeypatch, most=2)

    async def talk(reader: Reader, writer: Writer) -> None:
        address = writer.get_extra_info("peername")
        _, second = await asyncio.open_connection(*address)
        third, closing = await asyncio.open_connection(*address)
        status, problem = problem_in(await third.read())
        assert (status, problem["code"]) == (429, "too_many")
        second.close()
        closing.close()
        while True:  # until the server has heard of the end
            again, writing = await asyncio.open_connection(*address)
            writing.write(HEAD + b"Connection: close\r\n\r\n")
            answer = await again.read()
            writing.close()
            if answer.startswith(b"HTTP/1.1 204"):
                break
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 204")

    with_server(talk, app=quick_app)


def test_strangers_leave_places_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    of_elsewhere(monkeypatch, most=100)

    async def talk(reader: Reader, writer: Writer) -> None:
        status, problem = problem_in(await reader.read())
        assert (status, problem["code"]) == (503, "busy")
        monkeypatch.undo()  # the next one comes from here
        again, writing = await asyncio.open_connection(*writer.get_extra_info("peername"))
        writing.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await again.read()).startswith(b"HTTP/1.1 204")
        writing.close()

    with_server(talk, app=quick_app, limit_concurrency=LOCAL_CONNECTIONS_KEPT)


def test_a_named_proxy_has_as_many_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    of_elsewhere(monkeypatch, most=0)

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 204")

    with_server(talk, app=quick_app, http=protocol_behind(("::ffff:127.0.0.1",)))


def test_what_speaks_no_http_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(b"\x16\x03\x01 not http\r\n\r\n")
        assert problem_in(await reader.read())[0] == 400

    with_server(talk)
    assert "Invalid HTTP" not in caplog.text
