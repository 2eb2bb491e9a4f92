"""The statements of disputes on both kinds of store: each way to open, show, draw and end."""

from __future__ import annotations

import pytest

from lumaris_protocol import coordinator_api
from tests.coordinator.builders import NETWORK, Market, Party
from tests.coordinator.court import HOUR, PRICE, code, court_of, lock_bond
from tests.dispute_builders import split, withdrawal

STORES = ("sqlite", "postgres")


@pytest.mark.slow
async def test_a_dispute_on_every_store(market: Market) -> None:
    court = await court_of(market)
    client, work = market.client, court.work
    shown = (work.order(), work.delivery())
    unpaid = await court.opened(court.seller, "unpaid_delivery", evidence=shown, amount=5_000)
    for party in (court.seller, court.buyer):
        body = split(court.contract, unpaid, party.key, award=7, refund=0, network=NETWORK)
        await client.post(f"/v1/disputes/{unpaid}/split", content=body)
    await court.settles(unpaid)
    await court.claimed(PRICE)
    await market.party("sybil")
    checker = await market.party("checker", 5_000_000)
    await lock_bond(market, checker, 1_000_000)
    wrong = await court.opened(court.buyer, "wrong_result", order=1, evidence=shown, amount=PRICE)
    missing = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    await court.passes(1)
    assert (await court.show(wrong))["checkers"] == [checker.peer]
    assert code(await court.add(missing, Party("sybil"))) == "not_found"
    await court.add(missing, court.seller, *shown)
    body = withdrawal(court.contract, missing, court.buyer.key, network=NETWORK)
    answer = await client.post(f"/v1/disputes/{missing}/withdraw", content=body)
    assert answer.json()["state"] == "withdrawn"
    await court.passes(72 * HOUR + 1)
    assert (await court.settles(wrong))["rule"] == "check_missing"
    found = await client.get("/v1/disputes", headers=market.bearer(court.seller))
    page = coordinator_api.disputes("").read(found.status_code, found.content)
    assert [row.dispute for row in page.disputes] == [unpaid, wrong, missing]
    found = await client.get(f"/v1/disputes/{wrong}", headers=market.bearer(court.seller))
    detail = coordinator_api.dispute(wrong, "").read(found.status_code, found.content)
    assert detail.ruling is not None
    assert (detail.ruling.rule, detail.checkers) == ("check_missing", [checker.peer])
