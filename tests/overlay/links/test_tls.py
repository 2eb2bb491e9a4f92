"""The TLS stream: all bytes in order whatever the kernel takes, and every end is seen."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from lumaris_overlay.links import direct
from lumaris_overlay.links.carrier import LOST
from lumaris_overlay.links.tls import TlsStream


def tcp_pair(buffer_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
    near = socket.socket()
    with socket.socket() as listener:
        for sock in (near, listener):
            if buffer_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        near.connect(listener.getsockname())
        return near, listener.accept()[0]


@asynccontextmanager
async def tls_pair(buffer_bytes: int | None = None):
    """Two ends after their handshake."""
    context, pin = await trio.to_thread.run_sync(direct._server_context)
    socks = tcp_pair(buffer_bytes)
    near = TlsStream(socks[0], direct.client_context())
    far = TlsStream(socks[1], context, server_side=True)
    async with near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.do_handshake)
            nursery.start_soon(far.do_handshake)
        assert direct.pin_of(near.certificate) == pin
        yield near, far


async def read(stream: TlsStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.receive_some()
    return data


async def test_what_the_kernel_does_not_take_at_once_is_sent_first_later():
    parts = [os.urandom(size) for size in (10, 300_000, 7, 200_000, 1)]
    async with tls_pair(4096) as (near, far):
        assert near.send_now(parts[0]) and not near.has_rest
        assert not near.send_now(parts[1]) and near.has_rest
        with pytest.raises(trio.BusyResourceError):
            near.send_now(b"out of turn")
        got = []

        async def send() -> None:
            await near.send_all(b"")
            assert not near.has_rest
            for part in parts[2:]:
                await near.send_all(part)

        async def receive() -> None:
            got.append(await read(far, sum(map(len, parts))))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(receive)
        assert got == [b"".join(parts)]


async def test_both_ways_at_once():
    data = os.urandom(1 << 20)
    async with tls_pair() as ends, trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(end.send_all, data)

        async def check(end: TlsStream) -> None:
            assert await read(end, len(data)) == data

        for end in ends:
            nursery.start_soon(check, end)


async def test_a_read_is_bounded_by_what_was_asked_for():
    async with tls_pair() as (near, far):
        await near.send_all(b"x" * 1000)
        assert await far.receive_some(10) == b"x" * 10
        assert len(await read(far, 990)) == 990


async def test_the_end_is_an_end_for_reader_and_writer():
    async with tls_pair() as (near, far):
        await near.send_all(b"last")
        near.close()
        near.close()
        assert await far.receive_some() == b"last"
        assert await far.receive_some() == b""

        async def go_on() -> None:
            while True:
                await far.send_all(b"x" * 1000)

        with trio.fail_after(5), pytest.raises(LOST):
            await go_on()
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(b"x")


async def test_whoever_waits_is_told_of_a_close():
    async with tls_pair(4096) as (near, _), tls_pair(4096) as (full, _):

        async def wait_to(what, *arguments) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await what(*arguments)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_to, near.receive_some)
            nursery.start_soon(wait_to, full.send_all, bytes(1 << 22))
            await trio.testing.wait_all_tasks_blocked()
            near.close()
            full.close()


async def test_altered_bytes_break_the_connection():
    async with tls_pair() as (near, far):
        await near.send_all(b"signed and sealed")
        raw = bytearray(far.sock.recv(1000))
        raw[-1] ^= 1
        far._incoming.write(raw)
        with pytest.raises(LOST):
            await far.receive_some()


async def test_a_handshake_that_ends_early_fails():
    near, far = tcp_pair()
    stream = TlsStream(near, direct.client_context())
    far.shutdown(socket.SHUT_WR)
    async with stream:
        with pytest.raises(LOST):
            await stream.do_handshake()
    far.close()
