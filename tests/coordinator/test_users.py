"""Users, their passwords and sessions, and the peers they own."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from nacl import pwhash

from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.identity.passwords import Passwords
from lumaris_coordinator.store.port import all_rows
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.identity import PeerLink
from tests.coordinator.builders import NETWORK, Market, Party
from tests.coordinator.conftest import open_market

PASSWORD = "correct horse battery"


def quick(market: Market) -> Market:
    """Passwords that cost as little as the library allows."""
    market.coordinator.users._passwords = Passwords(
        ops=pwhash.argon2id.OPSLIMIT_MIN, memory=pwhash.argon2id.MEMLIMIT_MIN
    )
    return market


@pytest.fixture
async def town(tmp_path: Path, database: str) -> AsyncIterator[Market]:
    async with open_market(tmp_path / "state", database=database) as found:
        yield quick(found)


async def post(market: Market, path: str, token: str = "", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers["idempotency-key"] = f"{path} {body}"
    return await market.client.post(path, json=body, headers=headers)


async def get(market: Market, path: str, token: str) -> httpx.Response:
    return await market.client.get(path, headers={"authorization": f"Bearer {token}"})


async def delete(market: Market, path: str, token: str) -> httpx.Response:
    return await market.client.delete(path, headers={"authorization": f"Bearer {token}"})


async def sign_up(market: Market, name: str) -> tuple[str, str]:
    """A user's id and its token."""
    made = await post(market, "/v1/users", name=name, password=PASSWORD)
    assert made.status_code == 201, made.text
    return made.json()["user"], await log_in(market, name)


async def log_in(market: Market, name: str, password: str = PASSWORD) -> str:
    answer = await post(market, "/v1/sessions", name=name, password=password)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def peer_link(market: Market, party: Party, user: str, **changes: Any) -> bytes:
    fields = {
        "peer": party.peer,
        "coordinator": market.peer,
        "user": user,
        "issued_at": market.now,
        **changes,
    }
    return codec.sign(PeerLink(**fields), party.key, NETWORK).data


async def link(market: Market, token: str, body: bytes) -> httpx.Response:
    return await market.client.post(
        "/v1/users/me/peers", content=body, headers={"authorization": f"Bearer {token}"}
    )


async def test_a_user_has_an_account_and_a_token_for_a_day(town: Market) -> None:
    user, token = await sign_up(town, "ann")
    assert user.startswith("usr_")
    shown = (await get(town, "/v1/users/me", token)).json()
    assert shown == {
        "user": user,
        "name": "ann",
        "operator": False,
        "created_at": town.now,
        "peers": [],
    }
    assert (await get(town, "/v1/accounts/me", token)).json()["account"] == user
    town.clock.now += 12 * 3600
    assert (await get(town, "/v1/users/me", token)).status_code == 401


async def test_a_name_is_taken_once(town: Market) -> None:
    await sign_up(town, "ann")
    again = await post(town, "/v1/users", name="ann", password="another password")
    assert (again.status_code, again.json()["code"]) == (409, "name_taken")


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("an", PASSWORD),
        ("a" * 65, PASSWORD),
        ("an n", PASSWORD),
        ("ann", "short"),
        ("ann", "x" * 257),
    ],
)
async def test_names_and_passwords_are_bounded(town: Market, name: str, password: str) -> None:
    answer = await post(town, "/v1/users", name=name, password=password)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_registration_can_be_closed(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state", user_registration=False) as market:
        answer = await post(quick(market), "/v1/users", name="ann", password=PASSWORD)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_a_wrong_password_and_an_unknown_name_look_alike(town: Market) -> None:
    await sign_up(town, "ann")
    wrong = await post(town, "/v1/sessions", name="ann", password="not the password")
    unknown = await post(town, "/v1/sessions", name="ben", password="not the password")
    assert wrong.status_code == unknown.status_code == 401
    assert {**wrong.json(), "request_id": ""} == {**unknown.json(), "request_id": ""}


async def test_an_unknown_name_is_checked_against_a_hash_as_well() -> None:
    passwords = Passwords(ops=pwhash.argon2id.OPSLIMIT_MIN, memory=pwhash.argon2id.MEMLIMIT_MIN)
    assert not await passwords.check(None, "nobody")
    kept = await passwords.hash(PASSWORD)
    assert kept.startswith("$argon2id$")
    assert await passwords.check(kept, PASSWORD)
    assert not await passwords.check(kept, PASSWORD + "!")


class Slow(Passwords):
    """Hashing that ends when a test says so."""

    def __init__(self) -> None:
        super().__init__(ops=pwhash.argon2id.OPSLIMIT_MIN, memory=pwhash.argon2id.MEMLIMIT_MIN)
        self.go_on = threading.Event()

    def _hash(self, password: bytes) -> bytes:
        assert self.go_on.wait(20)
        return super()._hash(password)


async def test_strangers_who_register_keep_nobody_from_logging_in(town: Market) -> None:
    await sign_up(town, "ann")
    passwords = town.coordinator.users._passwords = Slow()
    passwords._nobody = b"made before"
    answers: list[httpx.Response] = []

    async def try_one(number: int) -> None:
        answers.append(await post(town, "/v1/users", name=f"user{number}", password=PASSWORD))

    async with anyio.create_task_group() as tasks:
        for number in range(250):
            tasks.start_soon(try_one, number)
        while len(answers) < 250 - 33:
            await anyio.lowlevel.checkpoint()
        assert {answer.json()["code"] for answer in answers} == {"busy"}
        await log_in(town, "ann")
        passwords.go_on.set()
    assert sum(answer.status_code == 201 for answer in answers) == 33


async def test_one_caller_has_few_places_in_the_line(town: Market) -> None:
    passwords = Slow()
    outcomes: list[str] = []

    async def try_one(caller: str) -> None:
        try:
            await passwords.hash(PASSWORD, caller=caller, known=True)
            outcomes.append(caller)
        except LumarisError as error:
            outcomes.append(error.code)

    async with anyio.create_task_group() as tasks:
        for caller in ["one"] * 20 + ["two"]:
            tasks.start_soon(try_one, caller)
        while len(outcomes) < 12:
            await anyio.lowlevel.checkpoint()
        assert outcomes == ["busy"] * 12
        passwords.go_on.set()
    assert sorted(outcomes[12:]) == ["one"] * 8 + ["two"]


async def test_an_address_makes_few_users_a_day(town: Market) -> None:
    address = "192.0.2.1"
    users = town.coordinator.users
    for number in range(10):
        await users.register(f"user{number}", PASSWORD, address=address)
    with pytest.raises(LumarisError) as caught:
        await users.register("one-more", PASSWORD, address=address)
    assert caught.value.code == "rate_limited"
    await users.register("elsewhere", PASSWORD, address="192.0.2.2")
    town.clock.now += 24 * 3600
    await users.register("tomorrow", PASSWORD, address=address)


async def test_a_full_table_takes_operators(town: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumaris_coordinator.identity.users.USERS_MAX", 1)
    await sign_up(town, "ann")
    full = await post(town, "/v1/users", name="ben", password=PASSWORD)
    assert (full.status_code, full.json()["code"]) == (503, "busy")
    create_operator(town.coordinator.settings, "root", clock=town.clock)


async def test_users_who_never_had_anything_are_forgotten(
    town: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumaris_coordinator.identity.users.USERS_LOOKED_AT_PER_ROUND", 2)
    create_operator(town.coordinator.settings, "root", clock=town.clock)
    owner, token = await sign_up(town, "owner")
    await link(town, token, peer_link(town, await town.party("ann"), owner))
    for name in ("keyed", "idle1", "idle2"):
        _, token = await sign_up(town, name)
        if name == "keyed":
            wish = {"name": "ci", "lifetime_s": 90 * 24 * 3600}
            assert (await post(town, "/v1/api-keys", token, **wish)).status_code == 201
    town.clock.now += 30 * 24 * 3600 - 1
    forgotten = [await town.coordinator.users.prune() for _ in range(3)]
    assert forgotten == [0, 0, 0]
    town.clock.now += 1
    await town.coordinator.identity.prune()
    assert sum([await town.coordinator.users.prune() for _ in range(3)]) == 2
    kept = await town.coordinator.store.read(
        lambda found: [str(name) for (name,) in all_rows(found, "SELECT name FROM users")]
    )
    assert sorted(kept) == ["keyed", "owner", "root"]
    assert (await town.audit())["balanced"]
    await sign_up(town, "idle1")  # the name is free


async def test_failures_are_limited_by_name_and_address(town: Market) -> None:
    await sign_up(town, "ann")
    codes = [
        (await post(town, "/v1/sessions", name="ann", password="not the password")).status_code
        for _ in range(6)
    ]
    assert codes == [401] * 5 + [429]
    locked = await post(town, "/v1/sessions", name="ann", password=PASSWORD)
    assert (locked.status_code, locked.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(locked.headers["retry-after"]) <= 30
    await log_in_ok(town, "ben")
    town.clock.now += 30
    await log_in(town, "ann")


async def test_many_guesses_at_once_count_as_many(town: Market) -> None:
    await sign_up(town, "ann")
    answers: list[int] = []

    async def guess() -> None:
        answers.append((await post(town, "/v1/sessions", name="ann", password="x")).status_code)

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(guess)
    assert sorted(answers) == [401] * 5 + [429] * 7


async def log_in_ok(market: Market, name: str) -> None:
    await sign_up(market, name)
    for _ in range(10):
        await log_in(market, name)  # what succeeds is not counted


async def test_a_new_password_ends_the_other_tokens(town: Market) -> None:
    _, first = await sign_up(town, "ann")
    second = await log_in(town, "ann")
    path = "/v1/users/me/password"
    wrong = await post(town, path, second, old="not the password", new="a new password")
    assert (wrong.status_code, wrong.json()["code"]) == (401, "unauthorized")
    changed = await post(town, path, second, old=PASSWORD, new="a new password")
    assert changed.status_code == 204, changed.text
    assert (await get(town, "/v1/users/me", first)).status_code == 401
    assert (await get(town, "/v1/users/me", second)).status_code == 200
    old = await post(town, "/v1/sessions", name="ann", password=PASSWORD)
    assert old.status_code == 401
    await log_in(town, "ann", "a new password")


async def test_logging_out_ends_one_token(town: Market) -> None:
    _, first = await sign_up(town, "ann")
    second = await log_in(town, "ann")
    assert (await delete(town, "/v1/sessions/me", first)).status_code == 204
    assert (await get(town, "/v1/users/me", first)).status_code == 401
    assert (await get(town, "/v1/users/me", second)).status_code == 200


async def test_a_user_sees_what_its_peer_does(town: Market) -> None:
    buyer, seller = await town.party("buyer", 20_000_000), await town.party("seller")
    user, token = await sign_up(town, "ann")
    _, stranger = await sign_up(town, "eve")
    deal = town.deal(buyer, seller)
    await town.grant(deal)
    path = f"/v1/escrows/{deal.session}"
    assert (await get(town, path, token)).status_code == 404
    linked = await link(town, token, peer_link(town, buyer, user))
    assert linked.json() == {"peers": [buyer.peer]}
    caller = await town.coordinator.identity.authenticate(f"Bearer {token}")
    assert caller.may_see(buyer.peer)
    assert caller.may_see(user)
    assert not caller.may_see(seller.peer)
    other = await town.coordinator.identity.authenticate(f"Bearer {stranger}")
    assert not other.may_see(buyer.peer, seller.peer)


async def test_a_peer_has_one_owner_and_either_side_can_part(town: Market) -> None:
    buyer = await town.party("buyer")
    ann, ann_token = await sign_up(town, "ann")
    ben, ben_token = await sign_up(town, "ben")
    by_ann = peer_link(town, buyer, ann)
    assert (await link(town, ann_token, by_ann)).status_code == 200
    assert (await link(town, ann_token, by_ann)).status_code == 200
    taken = await link(town, ben_token, peer_link(town, buyer, ben))
    assert (taken.status_code, taken.json()["code"]) == (409, "already_linked")
    path = f"/v1/users/me/peers/{buyer.peer}"
    assert (await delete(town, path, ben_token)).status_code == 404
    assert (await delete(town, path, town.tokens["buyer"])).status_code == 204
    # What the peer signed before it left does not bring it back.
    replayed = await link(town, ann_token, by_ann)
    assert (replayed.status_code, replayed.json()["code"]) == (409, "replayed")
    town.clock.now += 1
    assert (await link(town, ben_token, peer_link(town, buyer, ben))).status_code == 200
    assert (await delete(town, path, ben_token)).status_code == 204


async def test_links_are_refused(town: Market) -> None:
    buyer, eve = await town.party("buyer"), Party("eve")
    user, token = await sign_up(town, "ann")
    for body, code in (
        (peer_link(town, eve, user), "not_certified"),
        (peer_link(town, eve, user, peer=buyer.peer), "wrong_signer"),
        (peer_link(town, buyer, user, coordinator=eve.peer), "wrong_domain"),
        (peer_link(town, buyer, user, issued_at=town.now - 500), "expired"),
        (peer_link(town, buyer, "usr_" + "a" * 24), "forbidden"),
    ):
        assert (await link(town, token, body)).json()["code"] == code
    assert (await link(town, town.tokens["buyer"], peer_link(town, buyer, user))).status_code == 403


async def test_no_secret_lies_in_the_state(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    state = town.coordinator.settings.state
    held = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert PASSWORD.encode() not in held
    assert token.encode() not in held
