"""The buyer's certificate: cached for its key and coordinator alone, renewed before it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from msgspec import structs
from trio.testing import MockClock

from lumaris import membership
from lumaris.profile import Profile
from lumaris_overlay.simulated import open_network
from lumaris_protocol import codec
from lumaris_protocol.coordinator_api import Bootstrap, Challenge, Info, Membership, Request
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.messages.notice import KeyList, SigningKey

URL = "http://coordinator"
KEY, OLD, NEW, ROOT = (KeyPair(letter * 32) for letter in (b"b", b"o", b"n", b"r"))
LIFE_S = 24 * 3600


class FakeLink:
    """Answers what a registration asks; may be down."""

    def __init__(self) -> None:
        self.down = False
        self.count = 0
        self.now = 1_800_000_000.0
        self.signer, self.key_list = OLD, b""

    def list_keys(self, seq: int, *, revoked: bool = False) -> None:
        """What the coordinator says of its keys from now on; it signs with the newest."""
        self.signer = NEW if revoked else OLD
        now = int(self.now)
        keys = [SigningKey(peer=OLD.peer_id, not_before=0, not_after=now + 10**6)]
        if revoked:
            keys = [
                SigningKey(peer=OLD.peer_id, not_before=0, not_after=now + 10**6, revoked_at=now),
                SigningKey(peer=NEW.peer_id, not_before=0, not_after=now + 10**6),
            ]
        message = KeyList(root=ROOT.peer_id, seq=seq, keys=tuple(keys), issued_at=now)
        self.key_list = codec.sign(message, ROOT, "net").data

    def _certificate(self) -> bytes:
        now = int(self.now)
        message = MembershipCertificate(
            peer=KEY.peer_id,
            account="acc_" + "a" * 24,
            roles=("buyer",),
            bond_band=0,
            serial=self.count,
            issued_at=now,
            expires_at=now + LIFE_S,
        )
        return codec.sign(message, self.signer, "net").data

    async def call(self, request: Request[Any]) -> Any:
        if self.down:
            raise LumarisError("coordinator_unreachable")
        if request.path == "/v1/info":
            return Info("net", self.signer.peer_id, "TEST", 500, 60, 0, "1", int(self.now))
        if request.path == "/v1/identity/challenge":
            return Challenge("ab" * 16, int(self.now) + 60)
        if request.path.startswith("/.well-known/"):
            if not self.key_list:
                raise LumarisError("not_found")
            return self.key_list
        if request.path == "/v1/bootstrap":
            return Bootstrap([])
        assert request.path == "/v1/identity/register"
        self.count += 1
        return Membership(self._certificate(), "acc", f"token {self.count}", int(self.now) + LIFE_S)


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
        trusted = standing.trusted()
        renewed.append(await membership.renew(link, KEY, cache, lambda: standing, trusted))

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


async def test_a_certificate_of_a_revoked_key_is_replaced_at_the_next_start(
    link: Any, tmp_path: Path
) -> None:
    profile = Profile(tmp_path, URL)
    link.list_keys(1)
    assert (await membership.enter(link, KEY, profile)).token == "token 1"
    assert (await membership.enter(link, KEY, profile)).token == "token 1"
    link.list_keys(2, revoked=True)
    assert await join(link, tmp_path) == "token 1"  # nothing is known of it yet
    standing = await membership.enter(link, KEY, profile)
    assert (standing.token, standing.info.coordinator) == ("token 2", NEW.peer_id)
    assert await join(link, tmp_path) == "token 2"


async def test_what_is_known_to_be_revoked_is_nothing_to_go_on_with(
    link: Any, tmp_path: Path
) -> None:
    profile = Profile(tmp_path, URL)
    link.list_keys(1)
    standing = await membership.enter(link, KEY, profile)
    link.list_keys(2, revoked=True)
    cache = tmp_path / membership.CACHE_NAME
    cache.write_bytes(msgspec.json.encode(structs.replace(standing, key_list=link.key_list)))
    link.down = True
    with pytest.raises(LumarisError, match="coordinator_unreachable"):
        await join(link, tmp_path)


@pytest.mark.parametrize("seq", [1, 2])
async def test_a_list_that_does_not_follow_changes_nothing(
    link: Any, tmp_path: Path, seq: int
) -> None:
    profile = Profile(tmp_path, URL)
    link.list_keys(2)
    before = await membership.enter(link, KEY, profile)
    link.list_keys(seq, revoked=True)  # older, or another one with the same number
    assert await membership.enter(link, KEY, profile) == before


async def test_an_overlay_that_knows_more_makes_us_register_again(
    link: Any, tmp_path: Path
) -> None:
    profile = Profile(tmp_path, URL)
    link.list_keys(1)
    standing = await membership.enter(link, KEY, profile)
    async with open_network(
        "net",
        frozenset({OLD.peer_id}),
        now=lambda: float(link.now),
        roots=frozenset({ROOT.peer_id}),
    ) as net:
        host = net.host(KEY)
        assert await membership.present(host, link, KEY, profile, standing) == standing
        link.list_keys(2, revoked=True)
        await host.publish_notice(link.key_list)
        assert (await membership.present(host, link, KEY, profile, standing)).token == "token 2"


async def test_a_long_lived_client_registers_again_when_its_issuer_is_revoked(
    link: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    link.list_keys(1)
    cache = tmp_path / membership.CACHE_NAME
    standing = await membership.join(link, KEY, cache, url=URL)
    trusted = standing.trusted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_revoke_after, 600.0, link, trusted)
        with trio.fail_after(640):
            found = await membership.renew(link, KEY, cache, lambda: standing, trusted)
    assert (found.token, trio.current_time() >= 600) == ("token 2", True)


async def _revoke_after(delay_s: float, link: Any, trusted: TrustedKeys) -> None:
    await trio.sleep(delay_s)
    link.list_keys(2, revoked=True)
    trusted.learn(link.key_list)
