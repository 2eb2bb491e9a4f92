"""Connections that never ask are closed; those that wait for an answer are not."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from lumaris_coordinator.server import Protocol, Server

HEAD = b"GET / HTTP/1.1\r\nHost: coordinator\r\n"


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after twice the time in which a head must arrive."""
    await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def with_server(talk: Callable[[Reader, Writer], Awaitable[None]]) -> None:
    """Run a conversation with a server on a port of the system's choice."""

    async def serve() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            config = uvicorn.Config(slow_app, http=Protocol, lifespan="off", log_config=None)
            server = Server(config, ready="ready")
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
