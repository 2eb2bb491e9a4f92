"""Registration, certificates, tokens and bootstrap."""

from __future__ import annotations

import base64
from functools import partial

import pytest

from lumaris_coordinator.identity import store
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol import agreements
from tests.coordinator.builders import (
    NETWORK,
    START,
    Market,
    Party,
    bond_request,
    registration,
)
from tests.coordinator.postgres import INTEGRITY


async def test_registration_gives_a_certificate_that_checks_offline(market: Market) -> None:
    found = await market.register(Party("ann"), roles=("buyer",))
    certificate = agreements.open_certificate(
        base64.b64decode(found["certificate"]),
        network=NETWORK,
        coordinators=frozenset({market.peer}),
        peer=Party("ann").peer,
        role="buyer",
        now=START,
    )
    assert certificate.message.account == found["account"]
    assert certificate.message.expires_at == found["expires_at"] == START + 24 * 3600
    assert found["token"].startswith("lum_")


async def test_account_stays_and_the_serial_rises(market: Market) -> None:
    first = await market.register(Party("ann"))
    await market.register(Party("ben"))
    second = await market.register(Party("ann"))
    assert first["account"] == second["account"]
    serials = [
        agreements.open_certificate(
            base64.b64decode(found["certificate"]),
            network=NETWORK,
            coordinators=frozenset({market.peer}),
            peer=Party("ann").peer,
            role="seller",
            now=START,
        ).message.serial
        for found in (first, second)
    ]
    assert serials == [1, 3]


async def test_an_account_has_one_peer(market: Market) -> None:
    ann, ben = [await market.register(Party(name)) for name in ("ann", "ben")]
    assert ann["account"] != ben["account"]

    def share(connection: Connection) -> None:
        sql = "UPDATE peer SET account = ? WHERE account = ?"
        connection.execute(sql, (ann["account"], ben["account"]))

    with pytest.raises(INTEGRITY):
        await market.coordinator.store.submit(share)


async def test_challenge_is_used_once(market: Market) -> None:
    body = registration(Party("ann"), market.peer, await market.challenge(Party("ann")))
    answers = [await market.client.post("/v1/identity/register", content=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 409]
    assert answers[1].json()["code"] == "replayed"


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("another's challenge", "unauthorized"),
        ("invented challenge", "unauthorized"),
        ("late", "expired"),
        ("another coordinator", "wrong_domain"),
        ("another network", "bad_signature"),
        ("another peer", "wrong_signer"),
        ("stale", "expired"),
        ("ahead", "not_yet_valid"),
        ("bad address", "malformed"),
    ],
)
async def test_registration_refused(market: Market, case: str, code: str) -> None:
    ann = Party("ann")
    challenge = await market.challenge(Party("ben") if case == "another's challenge" else ann)
    if case == "invented challenge":
        challenge = "0" * 32
    if case == "late":
        market.clock.now += 301
    body = registration(
        ann,
        Party("eve").peer if case == "another coordinator" else market.peer,
        challenge,
        now=market.now + {"stale": -400, "ahead": 61}.get(case, 0),
        network="other" if case == "another network" else NETWORK,
        peer=Party("ben").peer if case == "another peer" else ann.peer,
        addresses=("/ip4/\x00",) if case == "bad address" else (),
    )
    answer = await market.client.post("/v1/identity/register", content=body)
    assert answer.json()["code"] == code, answer.text
    assert answer.json()["money_moved"] is False


async def test_token_ends_with_the_certificate_and_is_pruned(market: Market) -> None:
    ann = await market.party("ann")
    market.clock.now += 24 * 3600
    answer = await market.client.get("/v1/accounts/me", headers=market.bearer(ann))
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    await market.coordinator.run_chores()
    for table in ("token", "used_challenge"):
        sql = f"SELECT count(*) FROM {table}"
        assert await market.coordinator.store.read(partial(all_rows, sql=sql)) == [(0,)]


async def test_tokens_of_a_peer_are_bounded(market: Market) -> None:
    ann = Party("ann")
    tokens = [(await market.register(ann))["token"] for _ in range(9)]
    statuses = [
        (
            await market.client.get("/v1/accounts/me", headers={"authorization": f"Bearer {token}"})
        ).status_code
        for token in tokens
    ]
    assert statuses == [401] + [200] * 8


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer lum_x", "Basic lum_x", "Bearer é"])
async def test_bad_credentials(market: Market, header: str) -> None:
    headers = [(b"authorization", header.encode())]
    answer = await market.client.get("/v1/accounts/me", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


async def test_token_is_not_stored_in_clear(market: Market) -> None:
    ann = await market.party("ann")
    state = market.coordinator.settings.state
    secret = market.tokens[ann.name].encode()
    assert all(secret not in path.read_bytes() for path in state.rglob("*") if path.is_file())


async def seller(market: Market, name: str, *addresses: str) -> Party:
    found = Party(name)
    await market.register(found, roles=("seller",), addresses=addresses)
    return found


async def told(market: Market) -> list[str]:
    found: list[str] = (await market.client.get("/v1/bootstrap")).json()["addresses"]
    return found


async def test_bootstrap_names_sellers(market: Market) -> None:
    await market.register(Party("ann"), roles=("buyer",), addresses=("/ip4/127.0.0.1/tcp/1",))
    for number in range(20):
        await seller(market, f"s{number}", *(f"/ip4/127.0.0.1/tcp/{number}{n}" for n in (1, 2, 3)))
    found = await told(market)
    assert len(found) == 16
    numbers = [address.rpartition("/")[2] for address in found]
    assert {number[-1] for number in numbers} == {"1", "2"}  # two of each
    assert await told(market) == found  # kept, for it costs
    market.clock.now += 60
    assert await told(market) != found or await told(market) != found
    market.clock.now += 24 * 3600
    assert await told(market) == []  # their certificates have ended


async def test_bootstrap_leaves_out_revoked_and_inner_addresses(market: Market) -> None:
    inner = ("/ip4/10.0.0.1/tcp/1", "/ip4/169.254.169.254/tcp/80", "/ip6/::1/tcp/1", "junk")
    await seller(market, "inner", *inner)
    assert set(await told(market)) == set(inner[:2])  # there is nothing else
    await seller(market, "open", "/ip4/10.0.0.2/tcp/1", "/ip4/8.8.8.8/tcp/1", "/dns4/a.example/x")
    assert await told(market) == ["/ip4/8.8.8.8/tcp/1", "/dns4/a.example/x"]
    bad = await seller(market, "bad", "/ip4/9.9.9.9/tcp/1")
    assert len(await told(market)) == 3
    held = market.coordinator.revocations
    await market.coordinator.store.submit(
        lambda connection: held.revoke(connection, [(bad.peer, 0)], reason="x")
    )
    assert "/ip4/9.9.9.9/tcp/1" not in await told(market)


async def test_bootstrap_cannot_be_taken_over_from_one_network(market: Market) -> None:
    for number in range(6):
        await seller(market, f"honest{number}", f"/ip4/8.{number}.8.8/tcp/1")
    for number in range(20):
        await seller(market, f"sybil{number}", f"/ip4/9.9.9.{number}/tcp/1")
    bonded = await seller(market, "bonded", "/ip4/7.7.7.7/tcp/1")
    await market.fund(bonded, 10**9)
    body = bond_request(bonded, market.peer, "lock", 10**9)
    assert (await market.client.post("/v1/bonds", content=body)).status_code == 200
    found = await told(market)
    assert found[0] == "/ip4/7.7.7.7/tcp/1"
    assert sum(address.startswith("/ip4/9.9.9.") for address in found) == 1
    assert sum(address.startswith("/ip4/8.") for address in found) == 6


@pytest.mark.parametrize("body", [b"", b"{", b'{"peer":"x"}', b'{"peer":1}', b"[" * 5_000, b"\xff"])
async def test_challenge_wants_a_peer(market: Market, body: bytes) -> None:
    answer = await market.client.post("/v1/identity/challenge", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_info_names_the_terms(market: Market) -> None:
    found = (await market.client.get("/v1/info")).json()
    assert found["coordinator"] == market.peer
    assert (found["network"], found["currency"], found["fee_bps"]) == (NETWORK, "TEST", 500)
    assert found["time"] == START


async def test_what_has_expired_is_forgotten_in_parts(market: Market) -> None:
    for number in range(5):
        await market.party(f"p{number}")
    prune = partial(store.prune, now=market.now + 30 * 24 * 3600, limit=2)
    more = [await market.coordinator.store.submit(prune) for _ in range(4)]
    assert more == [True, True, False, False]
    left = await market.coordinator.store.read(
        lambda found: [
            first(found, f"SELECT count(*) FROM {table}") for table in ("token", "used_challenge")
        ]
    )
    assert left == [(0,), (0,)]
