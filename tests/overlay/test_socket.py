"""The socket client keeps the contract before simulated hosts; bad clients hurt nobody."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import AsyncExitStack

import pytest
import trio

from lumaris_overlay.simulated import open_network
from lumaris_overlay.socket import open_socket_overlay, serve_socket
from lumaris_overlay.socket.wire import Request, encode
from lumaris_overlay.tasks import background
from lumaris_protocol import frames
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.frames import Kind
from tests.overlay.conformance import Conformance, world_of
from tests.overlay.world import (
    KEYS,
    NETWORK,
    advert,
    certificate,
    key_of,
    next_of,
    open_when_ready,
    read_all,
    until,
)


@pytest.fixture
async def world(tmp_path):
    keys = [key_of(name) for name in ("one", "two", "three")]
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network(NETWORK, KEYS))
        hosts = [network.host(key) for key in keys]
        await hosts[1].connect([hosts[0].address])
        clients = []
        for number, host in enumerate(hosts):
            path = tmp_path / f"{number}.sock"
            await stack.enter_async_context(serve_socket(host, path, network=NETWORK))
            clients.append(await stack.enter_async_context(open_socket_overlay(path)))

        async def kill() -> None:
            network.kill(hosts[0])

        yield world_of(clients, keys, (hosts[0].address,), kill)


class TestSocket(Conformance):
    pass


@pytest.fixture
async def host():
    async with open_network(NETWORK, KEYS) as network:
        yield network.host(key_of("one"))


async def test_files_are_private(host, tmp_path):
    path = tmp_path / "state" / "overlay.sock"
    async with serve_socket(host, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def test_stale_socket_is_replaced_and_live_one_refused(host, tmp_path):
    path = tmp_path / "overlay.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    async with serve_socket(host, path):
        with pytest.raises(LumarisError) as caught:
            async with serve_socket(host, path):
                pass
        assert caught.value.code == "already_running"
        async with open_socket_overlay(path) as overlay:
            assert (await overlay.identity()).peer == host.peer_id


async def test_long_path_is_explained(host, tmp_path):
    with pytest.raises(LumarisError) as caught:
        async with serve_socket(host, tmp_path / ("x" * 120)):
            pass
    assert caught.value.code == "config_invalid"
    assert "107" in caught.value.message


async def test_nobody_there(tmp_path, autojump_clock):
    with pytest.raises(RemoteError) as caught:
        async with open_socket_overlay(tmp_path / "none.sock"):
            pass
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        os.urandom(64),
        frames.encode(Kind.HEADER, b"not json"),
        frames.encode(Kind.HEADER, b'{"op":"format the disk"}'),
        frames.encode(Kind.HEADER, b'{"op":"open","id":"x"}'),
        frames.encode(Kind.HEADER, b"[" * 9000),
        frames.encode(Kind.DATA, b"x"),
        frames.encode(Kind.HEADER, b"x" * 100_000),
        encode(Request("accept", token="guess")),
        encode(Request("publish", envelope=b"x" * 3000)),
    ],
    ids=range(13),
)
async def test_bad_client_is_refused_and_others_go_on(host, tmp_path, data):
    path = tmp_path / "overlay.sock"
    async with serve_socket(host, path):
        async with await trio.open_unix_socket(str(path)) as pipe:
            with trio.fail_after(5):
                await pipe.send_all(data)
                await pipe.send_eof()
                answer = await pipe.receive_some()
                assert not answer or answer[4] == Kind.REFUSAL
        async with open_socket_overlay(path) as overlay:
            assert (await overlay.identity()).peer == host.peer_id


async def test_client_recovers_when_the_server_comes_back(tmp_path):
    path = tmp_path / "overlay.sock"
    one, two = key_of("one"), key_of("two")

    async def hello(stream):
        await stream.send_all(b"hello")

    async def run_server(network, peer, scope, ended, task_status=trio.TASK_STATUS_IGNORED):
        with scope:
            host = network.host(one)
            await host.connect([peer.address])
            async with serve_socket(host, path):
                task_status.started()
                await trio.sleep_forever()
        network.kill(host)
        ended.set()

    async with open_network(NETWORK, KEYS) as network, background() as nursery:
        peer = network.host(two)
        await peer.publish_advert(advert(two, 1))
        scope, ended = trio.CancelScope(), trio.Event()
        await nursery.start(run_server, network, peer, scope, ended)
        async with (
            open_socket_overlay(path) as overlay,
            overlay.adverts() as events,
            overlay.serve("/hello/1", hello),
        ):
            await overlay.publish_advert(advert(one, 1))
            assert (await next_of(events, two.peer_id)).seq == 1
            scope.cancel()
            await ended.wait()
            later = network.host(key_of("later"))  # has not heard of one
            await nursery.start(run_server, network, later, trio.CancelScope(), trio.Event())
            async with later.adverts() as seen:
                await later.publish_advert(advert(two, 2))
                assert (await next_of(events, two.peer_id)).seq == 2
                assert (await next_of(seen, one.peer_id)).seq == 1
            with trio.fail_after(10):
                stream = await open_when_ready(later, one.peer_id, "/hello/1")
                async with stream:
                    assert await read_all(stream) == b"hello"


async def test_stream_of_a_vanished_client_is_given_up(tmp_path, host):
    """A client that dies while its peer stays silent must not hold the stream for ever."""
    path = tmp_path / "overlay.sock"
    broken = trio.Event()

    async def silent(stream):
        try:
            await stream.receive_some()
            await trio.sleep_forever()
        finally:
            broken.set()

    other = host._network.host(key_of("two"))
    async with serve_socket(other, path) as server, host.serve("/silent/1", silent):
        async with open_socket_overlay(path) as overlay:
            stream = await overlay.open_stream(host.peer_id, "/silent/1", addresses=[host.address])
            await stream.aclose()
        with trio.fail_after(10):
            while server.connections:
                await trio.sleep(0.01)


def test_client_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, lumaris_overlay.socket as s, lumaris_overlay.supervisor\n"
        "bad = {'libp2p', 'multiaddr', 'httpx', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_certificate_is_shown_again_after_a_restart(tmp_path, host):
    path, shown = tmp_path / "overlay.sock", []
    own = certificate(host.peer_id)

    async def present(data):
        await trio.lowlevel.checkpoint()
        shown.append(data)

    host.present = present

    async def run(scope, ended, task_status=trio.TASK_STATUS_IGNORED):
        with scope:
            async with serve_socket(host, path):
                task_status.started()
                await trio.sleep_forever()
        ended.set()

    async with background() as nursery:
        scope, ended = trio.CancelScope(), trio.Event()
        await nursery.start(run, scope, ended)
        async with open_socket_overlay(path) as overlay:
            await overlay.present(own)
            scope.cancel()
            await ended.wait()
            await nursery.start(run, trio.CancelScope(), trio.Event())
            await until(lambda: shown == [own, own])
