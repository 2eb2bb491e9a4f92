"""Idempotency-Key: applied once, answered alike, told apart, and forgotten in time."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio

from lumaris_coordinator import bounds, idempotency
from lumaris_coordinator.idempotency import Names, run_once
from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.sealing import Sealer
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party

URL = "https://hooks.example/a"


async def post(
    market: Market, party: Party, key: str | None, *, url: str = URL, query: str = ""
) -> httpx.Response:
    """The simplest unsigned POST: each one that is applied makes another webhook."""
    headers = market.bearer(party)
    if key is not None:
        headers["idempotency-key"] = key
    return await market.client.post(f"/v1/webhooks{query}", json={"url": url}, headers=headers)


async def made(market: Market, party: Party) -> int:
    answer = await market.client.get("/v1/webhooks", headers=market.bearer(party))
    return len(answer.json()["webhooks"])


async def test_a_repeat_gets_the_same_bytes_and_changes_nothing(market: Market) -> None:
    ann = await market.party("ann")
    first = await post(market, ann, "k")
    again = await post(market, ann, "k")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert await made(market, ann) == 1


async def test_requests_at_the_same_time_are_one(market: Market) -> None:
    ann = await market.party("ann")
    answers: list[httpx.Response] = []

    async def send() -> None:
        answers.append(await post(market, ann, "k"))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(send)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19
    assert await made(market, ann) == 1


async def test_another_request_under_the_key_is_refused(market: Market) -> None:
    ann = await market.party("ann")
    await post(market, ann, "k")
    for other in (
        await post(market, ann, "k", url=URL + "b"),
        await post(market, ann, "k", query="?x=1"),
    ):
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert await made(market, ann) == 1


async def test_keys_belong_to_their_principal(market: Market) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    first, second = await post(market, ann, "k"), await post(market, bob, "k")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]


async def test_what_the_header_must_be(market: Market) -> None:
    ann = await market.party("ann")
    for key, code in ((None, "idempotency_missing"), ("", "idempotency_missing"), ("k" * 256, "m")):
        answer = await post(market, ann, key)
        assert answer.status_code == 400
        assert answer.json()["code"].startswith(code)
    assert (await post(market, ann, "k" * 255)).status_code == 201
    headers = [*market.bearer(ann).items(), ("idempotency-key", "a"), ("idempotency-key", "b")]
    answer = await market.client.post("/v1/webhooks", json={"url": URL}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_a_refusal_is_not_kept(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = await market.party("ann")
    assert (await post(market, ann, "k", url="http://hooks.example/")).status_code == 422
    monkeypatch.setattr("lumaris_coordinator.webhooks.service.WEBHOOKS_PER_PRINCIPAL_MAX", 0)
    assert (await post(market, ann, "k")).status_code == 429  # refused inside the operation
    monkeypatch.undo()
    assert (await post(market, ann, "k")).status_code == 201


async def test_answers_are_kept_for_three_days_and_sealed(market: Market) -> None:
    ann = await market.party("ann")
    first = await post(market, ann, "k")
    market.clock.now += bounds.IDEMPOTENCY_KEPT_S - 1
    await market.register(ann)
    assert (await post(market, ann, "k")).content == first.content
    await market.coordinator.run_chores()

    def rows(connection: Connection) -> list[Any]:
        return all_rows(connection, "SELECT body FROM idempotency")

    kept = await market.coordinator.store.read(rows)
    assert len(kept) == 1
    assert b"whsec_" not in bytes(kept[0][0])
    market.clock.now += 1
    again = await post(market, ann, "k")  # forgotten, though not pruned yet
    assert (again.status_code, again.json()["id"] != first.json()["id"]) == (201, True)
    market.clock.now += bounds.IDEMPOTENCY_KEPT_S
    await market.coordinator.run_chores()
    assert await market.coordinator.store.read(rows) == []


async def test_the_number_of_kept_answers_is_bounded(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "IDEMPOTENCY_KEYS_PER_PRINCIPAL_MAX", 2)
    sealer = Sealer(bytes(32))
    names = [Names("p", bytes([n]) * 32, bytes(32)) for n in range(4)]

    async def run(name: Names, now: int) -> bytes:
        found = await market.coordinator.store.submit(
            lambda connection: run_once(connection, name, sealer, lambda: 7, status=200, now=now)
        )
        return found.body

    assert [await run(names[0], 1), await run(names[1], 2), await run(names[0], 3)] == [b"7"] * 3
    with pytest.raises(LumarisError, match="too_many"):
        await run(names[2], 3)
    assert await run(names[2], 1 + bounds.IDEMPOTENCY_KEPT_S) == b"7"


async def test_the_change_and_its_answer_stand_or_fall_together(market: Market) -> None:
    ann = await market.party("ann")
    sealer, name = Sealer(bytes(32)), Names(ann.peer, bytes(32), bytes(32))

    def fails(connection: Connection) -> None:
        run_once(connection, name, sealer, lambda: 7, status=200, now=market.now)
        raise ValueError

    with pytest.raises(ValueError):
        await market.coordinator.store.submit(fails)
    found = await market.coordinator.store.submit(
        lambda connection: run_once(connection, name, sealer, lambda: 8, status=200, now=market.now)
    )
    assert (found.body, found.replayed) == (b"8", False)


def test_what_is_sealed_opens_under_its_key_only() -> None:
    sealed = Sealer(bytes(32)).seal(b"secret")
    assert b"secret" not in sealed
    assert Sealer(bytes(32)).open(sealed) == b"secret"
    with pytest.raises(LumarisError):
        Sealer(b"x" * 32).open(sealed)


async def test_an_answer_is_repeated_only_to_the_credentials_that_got_it(market: Market) -> None:
    """A key of an operator that may only write must not be handed one that may do everything."""
    made = create_operator(market.coordinator.settings, "root", clock=market.clock)
    full = {"authorization": f"Bearer {made['key']}", "idempotency-key": "1"}
    body = {"name": "weak", "scopes": ["write"]}
    weak = (await market.client.post("/v1/api-keys", json=body, headers=full)).json()["key"]
    full["idempotency-key"], path = "2", f"/v1/api-keys/{made['id']}/rotate"
    assert (await market.client.post(path, headers=full)).status_code == 201
    replayed = {**full, "authorization": f"Bearer {weak}"}
    answer = await market.client.post(path, headers=replayed)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    assert "key" not in answer.json()
    assert (await market.client.post(path, headers=full)).json()["scopes"] == [
        "operator",
        "read",
        "write",
    ]
