"""The proxy between a guest and what its agreement names, on loopback taken for public."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from lumaris_node.egress import policy as policies
from lumaris_node.egress.policy import EgressPolicy
from lumaris_node.egress.proxy import EgressProxy

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture(autouse=True)
def _loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "is_public", lambda ip: ip == "127.0.0.1")


async def resolve(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"] if host == "up.example" else ["10.0.0.1"]


@asynccontextmanager
async def world(handler: Handler) -> AsyncIterator[tuple[EgressProxy, trio.SocketStream, int]]:
    """A proxy that may reach `up.example` on the handler's port, and a guest connected to it."""
    async with trio.open_nursery() as nursery:
        (upstream,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = upstream.socket.getsockname()[1]
        rules = (f"up.example:{port}", f"private.example:{port}")
        proxy = EgressProxy(EgressPolicy(rules, own=lambda: (), resolve=resolve))
        nursery.start_soon(trio.serve_listeners, handler, [upstream])
        nursery.start_soon(proxy.serve, listener)
        guest = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        async with guest:
            with trio.fail_after(10):
                yield proxy, guest, port
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def echo(stream: trio.SocketStream) -> None:
    await stream.send_all(b"said:" + await read_all(stream))
    await stream.aclose()


async def test_connect_is_a_tunnel_with_half_close():
    async with world(echo) as (proxy, guest, port):
        await guest.send_all(
            f"CONNECT up.example:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly ".encode()
        )
        await guest.send_all(b"late")
        await guest.send_eof()
        head, _, body = (await read_all(guest)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == b"said:early late"
        assert proxy.connected == {f"up.example:{port}": 1}
        assert (proxy.bytes_out, proxy.bytes_in) == (10, 15)


async def test_a_plain_request_is_passed_on_without_what_was_for_the_proxy():
    async def serve(stream: trio.SocketStream) -> None:
        seen = b""
        while b"abc" not in seen:
            seen += await stream.receive_some(4096)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + seen)
        await stream.aclose()

    async with world(serve) as (_, guest, port):
        await guest.send_all(
            f"POST http://up.example:{port}/a?b=c HTTP/1.1\r\nHost: other\r\n"
            "Proxy-Connection: x\r\nContent-Length: 3\r\n\r\nabc".encode()
        )
        answer = await read_all(guest)
        assert b"POST /a?b=c HTTP/1.1" in answer
        assert f"host: up.example:{port}".encode() in answer.lower()
        assert b"other" not in answer
        assert b"proxy-connection" not in answer.lower()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("CONNECT up.example:1 HTTP/1.1", b"403"),
        ("CONNECT other.example:PORT HTTP/1.1", b"403"),
        ("CONNECT private.example:PORT HTTP/1.1", b"403"),
        ("GET http://other.example/ HTTP/1.1", b"403"),
        ("GET / HTTP/1.1", b"400"),
        ("GET ftp://up.example:PORT/ HTTP/1.1", b"400"),
        ("CONNECT up.example HTTP/1.1", b"400"),
        ("CONNECT user@up.example:PORT HTTP/1.1", b"400"),
        ("CONNECT up.example:99999 HTTP/1.1", b"400"),
    ],
)
async def test_what_is_refused(request_line: str, status: bytes):
    async with world(echo) as (proxy, guest, port):
        line = request_line.replace("PORT", str(port))
        await guest.send_all(f"{line}\r\nHost: x\r\n\r\n".encode())
        answer = await read_all(guest)
        assert answer.split(b" ")[1] == status, answer
        assert not proxy.connected
        assert proxy.refused.total() == 1


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x00\xff" * 20, b"A" * 70_000, b"\r\n\r\n GET\r\n\r\n"]
)
async def test_junk_ends_the_connection_and_nothing_else(junk: bytes):
    async with world(echo) as (proxy, guest, _):
        with contextlib.suppress(trio.BrokenResourceError):
            await guest.send_all(junk)
            await guest.send_eof()
            await read_all(guest)
        assert not proxy.connected


async def test_an_upstream_that_ends_at_once():
    async def refuse(stream: trio.SocketStream) -> None:
        await stream.aclose()

    async with world(refuse) as (_, guest, port):
        await guest.send_all(f"CONNECT up.example:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"200" in await read_all(guest)
