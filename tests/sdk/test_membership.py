"""The buyer's certificate: cached for its key and coordinator alone, renewed before it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lumaris import membership
from lumaris_protocol.coordinator_api import Challenge, Info, Membership, Request
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair

URL = "http://coordinator"
KEY = KeyPair(b"b" * 32)
LIFE_S = 24 * 3600


class FakeLink:
    """Answers what a registration asks; may be down."""

    def __init__(self) -> None:
        self.down = False
        self.count = 0
        self.now = 1_800_000_000.0

    async def call(self, request: Request[Any]) -> Any:
        if self.down:
            raise LumarisError("coordinator_unreachable")
        if request.path == "/v1/info":
            return Info("net", KEY.peer_id, "TEST", 500, 60, 0, "1", int(self.now))
        if request.path == "/v1/identity/challenge":
            return Challenge("ab" * 16, int(self.now) + 60)
        if request.path.startswith("/.well-known/"):
            raise LumarisError("not_found")
        assert request.path == "/v1/identity/register"
        self.count += 1
        return Membership(b"cert", "acc", f"token {self.count}", int(self.now) + LIFE_S)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps does not wait for worker threads."""

    async def run(work: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr("trio.to_thread.run_sync", run)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = FakeLink()
    monkeypatch.setattr("time.time", lambda: found.now)
    return found


async def join(link: Any, folder: Path, *, key: KeyPair = KEY, url: str = URL) -> str:
    cache = folder / membership.CACHE_NAME
    return (await membership.join(link, key, cache, url=url)).token


async def test_the_cache_serves_one_key_at_one_coordinator(link: Any, tmp_path: Path) -> None:
    assert await join(link, tmp_path) == "token 1"
    assert (tmp_path / membership.CACHE_NAME).stat().st_mode & 0o777 == 0o600
    assert await join(link, tmp_path) == "token 1"
    assert await join(link, tmp_path, key=KeyPair(b"c" * 32)) == "token 2"
    assert await join(link, tmp_path, url="http://another") == "token 3"


async def test_an_expired_certificate_is_nothing_to_go_on_with(link: Any, tmp_path: Path) -> None:
    await join(link, tmp_path)
    link.down = True
    link.now += LIFE_S - 1800  # within the last hour: renewed if possible
    assert await join(link, tmp_path) == "token 1"
    link.now += 1800
    with pytest.raises(LumarisError, match="coordinator_unreachable"):
        await join(link, tmp_path)


async def test_a_long_lived_client_renews_however_long_it_takes(
    link: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    await join(link, tmp_path)
    cache = tmp_path / membership.CACHE_NAME
    standing = await membership.join(link, KEY, cache, url=URL)
    start, began = link.now, trio.current_time()
    renewed: list[membership.Standing] = []

    async def renew() -> None:
        renewed.append(await membership.renew(link, KEY, cache, standing))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(renew)
        for _ in range(8):
            await trio.sleep(3600)
            link.now = start + trio.current_time() - began
        assert not renewed
        link.down = True
        link.now = start + LIFE_S - 1000
        await trio.sleep(600)
        assert not renewed
        link.down = False
    assert renewed[0].token == "token 2"
    assert await join(link, tmp_path) == "token 2"
