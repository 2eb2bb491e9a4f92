"""Bonds: locked once, given back once, late, and not what a dispute took."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from lumaris_coordinator.bounds import BOND_NANOS_MIN, BOND_RELEASES_PER_PEER_MAX, CAP_NANOS_MIN
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.money import NANOS_PER_CREDIT, bond_band
from tests.coordinator.builders import NETWORK, Market, Party, bond_request, key_of

STORES = ("sqlite", "postgres")
WEEK = 7 * 24 * 3600
MIN = BOND_NANOS_MIN
FUNDS = 100 * MIN


async def ask(market: Market, party: Party, action: str, amount: int) -> httpx.Response:
    body = bond_request(party, market.peer, action, amount, now=market.now)
    return await market.client.post("/v1/bonds", content=body)


async def bond_of(market: Market, party: Party) -> dict[str, Any]:
    answer = await market.client.get("/v1/bonds/me", headers=market.bearer(party))
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["bonds"]
    assert found.pop("peer") == party.peer
    return dict(found)


async def later(market: Market, seconds: int, *parties: Party) -> None:
    market.clock.now += seconds
    await market.coordinator.run_chores()
    for party in parties:
        await market.register(party)


async def test_a_bond_is_locked_and_comes_back_once_after_the_wait(market: Market) -> None:
    ann = await market.party("ann", FUNDS)
    assert (await ask(market, ann, "lock", 30 * MIN)).status_code == 200
    assert await market.free(ann) == 70 * MIN
    assert (await ask(market, ann, "release", 20 * MIN)).status_code == 200
    bond = await bond_of(market, ann)
    assert bond == {
        "currency": "TEST",
        "locked_nanos": 30 * MIN,
        "owed_nanos": 0,
        "band": 0,
        "releases": [{"amount_nanos": 20 * MIN, "due": market.now + WEEK}],
    }
    assert (await ask(market, ann, "release", 11 * MIN)).json()["code"] == "no_funds"
    await later(market, WEEK - 1, ann)
    assert await market.free(ann) == 70 * MIN
    for _ in range(2):
        await later(market, 1, ann)
        assert await market.free(ann) == 90 * MIN
    assert (await bond_of(market, ann))["releases"] == []
    assert (await bond_of(market, ann))["locked_nanos"] == 10 * MIN
    assert (await market.audit())["balanced"]


async def test_the_same_bytes_are_the_same_request(market: Market) -> None:
    ann = await market.party("ann", FUNDS)
    body = bond_request(ann, market.peer, "lock", 30 * MIN, nonce="0" * 32)
    first = await market.client.post("/v1/bonds", content=body)
    assert (await ask(market, ann, "lock", MIN)).status_code == 200
    again = await market.client.post("/v1/bonds", content=body)
    assert again.content == first.content
    assert await market.free(ann) == 69 * MIN
    other = bond_request(ann, market.peer, "lock", 31 * MIN, nonce="0" * 32)
    answer = await market.client.post("/v1/bonds", content=other)
    assert answer.json()["code"] == "idempotency_mismatch"


async def test_bond_requests_refused(market: Market) -> None:
    ann, eve = await market.party("ann", FUNDS), Party("eve")

    def body(amount: int = MIN, action: str = "lock", **changes: Any) -> bytes:
        party = changes.pop("party", ann)
        coordinator = changes.pop("coordinator", market.peer)
        changes.setdefault("now", market.now)
        return bond_request(party, coordinator, action, amount, **changes)

    cases = {
        "more than there is": (body(FUNDS + 1), "no_funds"),
        "less than the least": (body(MIN - 1), "usage"),
        "nothing locked": (body(action="release"), "no_funds"),
        "a stranger": (body(party=eve), "not_certified"),
        "for another": (body(party=eve, peer=ann.peer), "wrong_signer"),
        "elsewhere": (body(coordinator=key_of("c").peer_id), "wrong_domain"),
        "stale": (body(now=market.now - 361), "expired"),
        "from the future": (body(now=market.now + 61), "not_yet_valid"),
        "a currency unknown here": (body(currency="EUR"), "terms_refused"),
    }
    for case, (data, code) in cases.items():
        answer = await market.client.post("/v1/bonds", content=data)
        assert answer.json()["code"] == code, (case, answer.text)
    assert await market.free(ann) == FUNDS


async def test_releases_of_a_peer_are_few(market: Market) -> None:
    ann = await market.party("ann", FUNDS)
    await ask(market, ann, "lock", FUNDS)
    for _ in range(BOND_RELEASES_PER_PEER_MAX):
        assert (await ask(market, ann, "release", MIN)).status_code == 200
    assert (await ask(market, ann, "release", MIN)).json()["code"] == "too_many_holds"
    await later(market, WEEK, ann)
    assert await market.free(ann) == BOND_RELEASES_PER_PEER_MAX * MIN


async def test_what_a_dispute_took_is_not_released(market: Market) -> None:
    ann, ben = await market.party("ann", FUNDS), await market.party("ben")
    await ask(market, ann, "lock", 30 * MIN)
    await ask(market, ann, "release", 30 * MIN)
    winner = wallet((await market.account(ben))["account"], "TEST")

    def take(connection: Connection) -> None:
        source = bonds.account_of_bond(ann.peer, "TEST")
        bonds.take(connection, source=source, ref="dsp_1", amount=12 * MIN, now=market.now)
        assert bonds.free(connection, ann.peer, "TEST") == 18 * MIN
        bonds.give(connection, ref="dsp_1", to=winner, amount=5 * MIN, now=market.now)

    def overdraw(connection: Connection) -> None:
        bonds.give(connection, ref="dsp_1", to=winner, amount=8 * MIN, now=market.now)

    store = market.coordinator.store
    await store.submit(take)
    with pytest.raises(LumarisError, match="no_funds"):
        await store.submit(overdraw)
    await later(market, WEEK, ann, ben)
    assert await market.free(ann) == 88 * MIN
    assert await market.free(ben) == 5 * MIN
    left = await store.read(
        lambda connection: balance(connection, bonds.account_of_dispute("dsp_1", "TEST"))
    )
    assert left == 7 * MIN
    assert (await market.audit())["balanced"]


async def test_a_bond_waits_for_the_disputes_of_others(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller", FUNDS)
    for party in (buyer, seller):
        await ask(market, party, "lock", 30 * MIN)
        await ask(market, party, "release", 30 * MIN)
    deal = market.deal(buyer, seller, cap=CAP_NANOS_MIN)
    await market.grant(deal)
    free = await market.free(buyer)

    def open_one(connection: Connection) -> None:
        connection.execute(
            "INSERT INTO dispute (id, number, agreement_hash, buyer, seller, opener, opened, claim,"
            " order_n, currency, amount, bond, stake, refund_max, vouchered, frozen, state,"
            " opened_at, evidence_until, due_at) VALUES ('dsp_1', 1, ?, ?, ?, ?, '',"
            " 'not_delivered', 0, 'TEST', 0, 0, 0, 0, 0, 0, 'opened', 0, 0, 0)",
            (deal.hash, buyer.peer, seller.peer, buyer.peer),
        )

    def end_it(connection: Connection) -> None:
        connection.execute("UPDATE dispute SET state = 'settled'")

    store = market.coordinator.store
    await store.submit(open_one)
    market.clock.now += WEEK
    await market.coordinator.bonds.run_chores()
    await market.register(buyer)
    await market.register(seller)
    assert await market.free(seller) == 70 * MIN
    assert await market.free(buyer) == free + 30 * MIN  # its own dispute holds nothing of it
    await store.submit(end_it)
    await market.coordinator.bonds.run_chores()
    assert await market.free(seller) == FUNDS


async def test_the_certificate_tells_the_band_at_its_renewal(market: Market) -> None:
    ann = await market.party("ann", 20 * NANOS_PER_CREDIT)
    await ask(market, ann, "lock", 15 * NANOS_PER_CREDIT)
    assert await band_of(market, ann) == 2
    await ask(market, ann, "release", 6 * NANOS_PER_CREDIT)
    assert await band_of(market, ann) == 1


async def band_of(market: Market, party: Party) -> int:
    data = base64.b64decode((await market.register(party))["certificate"])
    found = codec.open_signed(data, MembershipCertificate, network=NETWORK)
    return found.message.bond_band


async def test_strangers_see_no_bonds(market: Market) -> None:
    ann, eve = await market.party("ann", FUNDS), await market.party("eve")
    await ask(market, ann, "lock", MIN)
    answer = await market.client.get("/v1/bonds/me", headers=market.bearer(eve))
    assert answer.json() == {"bonds": []}
    assert (await market.client.get("/v1/bonds/me")).status_code == 401


def test_bands_are_powers_of_ten_of_credits() -> None:
    bands = {0: 0, NANOS_PER_CREDIT - 1: 0}
    for power in range(6):
        bands[10**power * NANOS_PER_CREDIT] = power + 1
        bands[10 ** (power + 1) * NANOS_PER_CREDIT - 1] = power + 1
    assert {nanos: bond_band(nanos) for nanos in bands} == bands
    assert bond_band(-1) == 0
