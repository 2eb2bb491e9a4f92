"""The node's certificate: asked for seldom, kept on disk, renewed, good without a coordinator."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lumaris_node.membership import Enrolment, Standing
from lumaris_node.store import Store
from lumaris_protocol import codec
from lumaris_protocol.coordinator_api import Bootstrap, Info, Membership
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.messages.notice import KeyList, SigningKey

URL = "http://coordinator"
KEY = KeyPair(b"m" * 32)
HERE = ("/ip4/192.0.2.1/tcp/4001",)
ELSEWHERE = ("/ip4/192.0.2.2/tcp/4001",)
LIFE_S = 24 * 3600


def named(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(name.encode()).digest())


NAMED = tuple(map(named, ("C1", "C2", "one", "two", "new")))


class FakeLink:
    """A coordinator that counts what it is asked, and may be down."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.down, self.coordinator = clock, "", named("C1").peer_id
        self.asked: list[str] = []
        self.key_list = b""
        self.registered: list[tuple[str, ...]] = []

    def _note(self, what: str) -> None:
        self.asked.append(what)
        if self.down:
            raise LumarisError(self.down)

    async def info(self) -> Info:
        self._note("info")
        return Info("net", self.coordinator, "TEST", 500, 60, 0, "1", int(self.clock()))

    async def register(self, _key: KeyPair, _info: Info, *, addresses: Any, clock: Any) -> Any:
        self._note("register")
        self.registered.append(addresses)
        number = len(self.registered)
        return Membership(
            self._certificate(number), "acc", f"token {number}", int(clock()) + LIFE_S
        )

    def _certificate(self, serial: int) -> bytes:
        now = int(self.clock())
        message = MembershipCertificate(
            peer=KEY.peer_id,
            account="acc_" + "a" * 24,
            roles=("seller",),
            bond_band=0,
            serial=serial,
            issued_at=now,
            expires_at=now + LIFE_S,
        )
        signer = next(key for key in NAMED if key.peer_id == self.coordinator)
        return codec.sign(message, signer, "net").data

    async def call(self, request: Any) -> Bootstrap:
        if request.path.startswith("/.well-known/"):
            if self.down or not self.key_list:
                raise LumarisError(self.down or "not_found")
            return self.key_list  # type: ignore[return-value]
        self._note("bootstrap")
        return Bootstrap(["/ip4/192.0.2.9/tcp/1/p2p/x"])


class World:
    """One node's state folder over several starts."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "membership.json"
        self.ahead_s = 0.0
        self.link = FakeLink(self.now)

    def now(self) -> float:
        return 1_800_000_000 + trio.current_time() + self.ahead_s

    def start(self, *, url: str = URL, key: KeyPair = KEY) -> Enrolment:
        self.link.asked.clear()
        link: Any = self.link
        return Enrolment(link, key, self.cache, url=url, clock=self.now)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps does not wait for worker threads."""

    async def run(work: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr("trio.to_thread.run_sync", run)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_the_first_start_registers_twice_and_a_restart_never(world: World) -> None:
    enrolment = world.start()
    await enrolment.join()
    await enrolment.announce(HERE)
    assert world.link.asked == ["info", "register", "bootstrap", "register"]
    assert world.link.registered == [(), HERE]
    assert world.cache.stat().st_mode & 0o777 == 0o600
    before = enrolment.standing
    enrolment = world.start()
    assert await enrolment.join() == before
    await enrolment.announce(HERE)
    assert world.link.asked == ["info", "bootstrap"]
    await enrolment.announce(ELSEWHERE)
    assert world.link.registered[-1] == ELSEWHERE
    assert enrolment.standing.bootstrap == before.bootstrap


async def test_without_a_coordinator_the_cache_serves_while_it_is_valid(world: World) -> None:
    world.link.down = "coordinator_unreachable"
    with pytest.raises(LumarisError, match="coordinator_unreachable"):
        await world.start().join()
    world.link.down = ""
    standing = await world.start().join()
    world.link.down = "coordinator_unreachable"
    world.ahead_s = LIFE_S * 0.9  # old enough to be renewed, still valid
    enrolment = world.start()
    assert await enrolment.join() == standing
    await enrolment.announce(HERE)
    assert enrolment.standing == standing
    world.ahead_s = LIFE_S - 30.0
    with pytest.raises(LumarisError, match="coordinator_unreachable"):
        await world.start().join()


async def test_an_old_certificate_is_renewed_at_start_with_the_addresses_of_before(
    world: World,
) -> None:
    enrolment = world.start()
    await enrolment.join()
    await enrolment.announce(HERE)
    world.ahead_s = LIFE_S * 0.6
    enrolment = world.start()
    await enrolment.join()
    await enrolment.announce(HERE)
    assert world.link.asked == ["info", "register", "bootstrap"]
    assert world.link.registered[-1] == HERE


@pytest.mark.parametrize("spoil", ["garbage", "other url", "other key", "other coordinator"])
async def test_a_cache_of_something_else_is_not_used(world: World, spoil: str) -> None:
    await world.start().join()
    url, key = URL, KEY
    if spoil == "garbage":
        world.cache.write_bytes(b"\xff{")
    elif spoil == "other url":
        url = "http://another"
    elif spoil == "other key":
        key = KeyPair(b"n" * 32)
    else:
        world.link.coordinator = named("C2").peer_id
    standing = await world.start(url=url, key=key).join()
    assert "register" in world.link.asked
    assert standing.token == "token 2"
    assert (standing.peer, standing.url) == (key.peer_id, url)


async def test_another_coordinator_that_does_not_register_us_is_no_reason_to_go_on(
    world: World,
) -> None:
    await world.start().join()
    world.link.coordinator = named("C2").peer_id

    async def refuse(*_: object, **__: object) -> Membership:
        raise LumarisError("busy")

    enrolment = world.start()
    enrolment._link.register = refuse  # type: ignore[method-assign]
    with pytest.raises(LumarisError, match="busy"):
        await enrolment.join()


async def test_it_keeps_trying_behind_and_then_says_what_changed(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await world.start().join()
    world.link.down = "coordinator_unreachable"
    enrolment = world.start()
    await enrolment.join()
    told: list[Standing] = []
    done = trio.Event()

    async def addresses() -> tuple[str, ...]:
        return HERE

    async def changed(standing: Standing) -> None:
        told.append(standing)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(enrolment.keep, addresses, changed)
        await trio.sleep(600)
        assert not told
        assert len(world.link.asked) < 20  # it backs off
        world.link.down = ""
        with trio.fail_after(120):
            await done.wait()
        assert told[0].addresses == HERE
        # Nothing to say for hours, then the renewal at half life.
        count = len(world.link.registered)
        await trio.sleep(LIFE_S * 0.4)
        assert len(world.link.registered) == count
        await trio.sleep(LIFE_S * 0.2)
        assert len(world.link.registered) == count + 1
        nursery.cancel_scope.cancel()


async def test_restless_addresses_are_announced_now_and_then(
    world: World, autojump_clock: MockClock
) -> None:
    enrolment = world.start()
    await enrolment.join()

    async def addresses() -> tuple[str, ...]:
        return (f"/ip4/192.0.2.1/tcp/{int(trio.current_time()) % 60_000}",)

    async def changed(_: Standing) -> None:
        return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(enrolment.keep, addresses, changed)
        await trio.sleep(3000)
        nursery.cancel_scope.cancel()
    assert 5 <= len(world.link.registered) <= 12


async def test_advert_numbers_grow_over_restarts_and_a_clock_that_goes_back(
    tmp_path: Path,
) -> None:
    numbers: list[int] = []
    for now in (1_800_000_000.9, 1_800_000_000.1, 1_700_000_000.0, 5.0, 1_800_000_100.0):
        store = Store(tmp_path / "node.db")
        numbers += [await store.next_advert_seq(now=now) for _ in range(2)]
        store.close()
    assert numbers == sorted(set(numbers))
    assert numbers[-2] == 1_800_000_100


def listed(root: str, seq: int, *names: str, revoked: str = "") -> bytes:
    keys = tuple(
        SigningKey(
            peer=named(name).peer_id,
            not_before=0,
            not_after=1 << 39,
            revoked_at=1_700_000_000 if name == revoked else 0,
        )
        for name in names
    )
    key = named(root)
    message = KeyList(root=key.peer_id, seq=seq, keys=keys, issued_at=1_700_000_000)
    return codec.sign(message, key, "net").data


async def test_a_rotated_coordinator_is_the_same_one(world: World) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 1, "one")
    before = await world.start().join()
    world.link.coordinator = named("two").peer_id
    world.link.key_list = listed("root", 2, "one", "two")
    enrolment = world.start()
    standing = await enrolment.join()
    assert standing.certificate == before.certificate  # good until it ends
    assert standing.info.coordinator == named("two").peer_id
    assert set(enrolment.trusted) == {named("one").peer_id, named("two").peer_id}
    world.link.down = "coordinator_unreachable"
    enrolment = world.start()
    await enrolment.join()
    assert set(enrolment.trusted) == {named("one").peer_id, named("two").peer_id}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (listed("another", 9, "one"), "root_changed"),
        (listed("root", 1, "one"), "list_stale"),
        (listed("root", 3, "two"), "wrong_signer"),
        (b"", "list_stale"),
    ],
)
async def test_a_list_that_does_not_follow_is_refused(world: World, data: bytes, code: str) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 2, "one")
    await world.start().join()
    world.link.key_list = data
    with pytest.raises(LumarisError) as caught:
        await world.start().join()
    assert caught.value.code == code


async def test_a_coordinator_set_up_anew_is_met_for_the_first_time(world: World) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 2, "one")
    before = await world.start().join()
    world.link.coordinator, world.link.key_list = named("new").peer_id, listed("root2", 1, "new")
    enrolment = world.start()
    assert (await enrolment.join()).certificate != before.certificate
    assert enrolment.trusted.roots == {named("root2").peer_id}


@asynccontextmanager
async def kept(enrolment: Enrolment) -> AsyncIterator[list[Standing]]:
    """A node that stays where it is, for as long as the context lasts; its new standings."""
    renewed: list[Standing] = []

    async def here() -> tuple[str, ...]:
        return HERE

    async def changed(standing: Standing) -> None:
        renewed.append(standing)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(enrolment.keep, here, changed)
        yield renewed
        nursery.cancel_scope.cancel()


async def test_a_renewal_takes_the_new_key_up(world: World, autojump_clock: MockClock) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 1, "one")
    enrolment = world.start()
    await enrolment.join()
    await enrolment.announce(HERE)
    world.link.coordinator = named("two").peer_id
    world.link.key_list = listed("root", 2, "one", "two")
    async with kept(enrolment) as renewed:
        await trio.sleep(LIFE_S * 0.6)
    assert renewed[-1].info.coordinator == named("two").peer_id
    assert named("two").peer_id in enrolment.trusted


@pytest.mark.parametrize("restarts", [0, 2])
async def test_a_certificate_of_a_revoked_key_is_replaced_at_the_next_start(
    world: World, restarts: int
) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 1, "one")
    before = await world.start().join()
    world.link.coordinator = named("two").peer_id
    world.link.key_list = listed("root", 2, "one", "two")
    for _ in range(restarts):  # the terms of now name the new key, the certificate is of the old
        assert (await world.start().join()).certificate == before.certificate
    world.link.key_list = listed("root", 3, "one", "two", revoked="one")
    enrolment = world.start()
    assert (await enrolment.join()).token == "token 2"
    assert enrolment.trusted.signed(enrolment.standing.certificate)


async def test_a_running_node_registers_again_when_it_hears_of_a_revocation(
    world: World, autojump_clock: MockClock
) -> None:
    world.link.coordinator, world.link.key_list = named("one").peer_id, listed("root", 1, "one")
    enrolment = world.start()
    await enrolment.join()
    await enrolment.announce(HERE)
    async with kept(enrolment) as renewed:
        await trio.sleep(600)
        world.link.coordinator = named("two").peer_id
        world.link.key_list = listed("root", 2, "one", "two", revoked="one")
        enrolment.trusted.learn(world.link.key_list)
        await trio.sleep(40)
        assert [standing.token for standing in renewed] == ["token 3"]
        await trio.sleep(600)  # once is enough
        assert len(renewed) == 1
