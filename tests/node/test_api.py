"""The node's local socket and its settings."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris_node import api, config
from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from tests.market import Market, eventually


@asynccontextmanager
async def serving(path: Path, status: Any = None) -> AsyncIterator[list[str]]:
    """The socket, answered; what was asked for."""
    asked: list[str] = []

    async def answer() -> dict[str, Any]:
        asked.append("status")
        return {"status": "well"}

    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await api.serve(
                path,
                status=status or answer,
                stop=lambda: asked.append("down"),
                task_status=task_status,
            )

        await nursery.start(run)
        yield asked
        nursery.cancel_scope.cancel()
    assert not path.exists()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / api.SOCKET_NAME


async def code_of(awaitable: Any) -> str:
    with pytest.raises(LumarisError) as caught:
        await awaitable
    return caught.value.code


async def test_status_and_down(path: Path):
    async with serving(path) as asked:
        assert path.stat().st_mode & 0o777 == 0o600
        assert await api.call(path, "status") == {"status": "well"}
        assert await api.call(path, "down") == {}
        assert asked == ["status", "down"]
    assert await code_of(api.call(path, "status")) == "not_running"


async def test_a_second_node_is_refused(path: Path):
    async with serving(path):
        assert await code_of(api.check_free(path)) == "already_running"
        assert await api.call(path, "status") == {"status": "well"}


async def test_a_node_in_trouble_still_runs(path: Path):
    async def status() -> dict[str, Any]:
        raise LumarisError("overlay_failed")

    async with serving(path, status):
        assert await code_of(api.call(path, "status")) == "overlay_failed"
        assert await code_of(api.check_free(path)) == "already_running"


async def test_a_stale_socket_is_taken_over(path: Path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    assert await code_of(api.call(path, "status")) == "not_running"
    async with serving(path):
        assert await api.call(path, "status") == {"status": "well"}


async def test_a_path_the_kernel_cannot_hold(tmp_path: Path):
    long = tmp_path / ("x" * 100) / api.SOCKET_NAME
    assert await code_of(api.check_free(long)) == "config_invalid"


async def test_nonsense_on_the_socket(path: Path):
    async with serving(path) as asked:
        for data in (os.urandom(64), b"", b"\0\0\0\5\3nope", b"\0\0\0\1\5"):
            stream = await trio.open_unix_socket(str(path))
            await stream.send_all(data)
            await stream.send_eof()
            framed = FramedStream(stream)
            with trio.fail_after(5):
                with pytest.raises(LumarisError):
                    await framed.expect_header(dict)
            await framed.aclose()
        assert asked == []
        assert await api.call(path, "status") == {"status": "well"}


async def test_an_unknown_call_is_refused(path: Path):
    async with serving(path):
        stream = FramedStream(await trio.open_unix_socket(str(path)))
        await stream.send(Kind.HEADER, b'{"call":"status","and":1}')
        assert await code_of(stream.expect_header(dict)) == "malformed"
        await stream.aclose()


@pytest.mark.slow
@pytest.mark.planet
async def test_a_running_node_says_what_it_does(market: Market):
    seller = await market.seller()
    socket_path = seller.state / api.SOCKET_NAME
    status = await api.call(socket_path, "status")
    assert status["peer"] == seller.peer
    assert status["free"] == status["total"]
    assert status["runtimes"] == ["wasm"]
    with pytest.raises(LumarisError) as caught:
        await type(seller.node)(seller.state, seller.node.config).run(lambda *_: None)
    assert caught.value.code == "already_running"
    await api.call(socket_path, "down")
    with trio.fail_after(10):
        await seller.gone.wait()
    await eventually(lambda: not socket_path.exists(), "the socket is gone")


def test_settings_come_from_the_file_then_from_flags(tmp_path: Path):
    (tmp_path / "node.toml").write_text('region = "north"\n[share]\ncpu_threads = 2\n')
    found = config.load(tmp_path, region=None, coordinator="http://other")
    assert (found.region, found.coordinator) == ("north", "http://other")
    assert found.share.cpu_threads == 2
    assert config.load(tmp_path / "none").region == "local"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("share = 1", "share"),
        ("[share]\ncpu_percent = 0", "cpu_percent"),
        ("[share]\ncpu_percent = 101", "cpu_percent"),
        ('[share]\nmemory_percent = "x"', "memory_percent"),
        ("[share]\nsurprise = 1", "surprise"),
        ("surprise = 1", "surprise"),
        ('[price]\nstart = "cheap"', "price"),
        ('[price]\nstart = "-1"', "price"),
        ("[accept]\nlease_s_max = 1", "lease_s_max"),
        ('[accept]\nruntimes = ["shell"]', "runtimes"),
        ('log_level = "loud"', "log_level"),
        ("not toml at all", "node.toml"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(LumarisError) as caught:
        config.load(tmp_path)
    assert caught.value.code == "config_invalid"
    assert named in caught.value.message


def test_settings_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "node.toml").mkdir()
    with pytest.raises(LumarisError) as caught:
        config.load(tmp_path)
    assert caught.value.code == "config_invalid"
    (tmp_path / "node.toml").rmdir()
    (tmp_path / "node.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(LumarisError):
        config.load(tmp_path)
