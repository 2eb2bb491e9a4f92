"""The interface that the other parts are written against, spoken to the real coordinator."""

from __future__ import annotations

from typing import TypeVar

import pytest

from lumaris_protocol import coordinator_api as api
from lumaris_protocol import receipts
from lumaris_protocol.errors import RefusedError
from tests.coordinator.builders import Market, Party, credit_request, registration

T = TypeVar("T")


async def call(market: Market, request: api.Request[T]) -> T:
    answer = await market.client.request(
        request.method, request.path, content=request.body, headers=request.headers
    )
    return request.read(answer.status_code, answer.content)


async def join(market: Market, name: str) -> tuple[Party, api.Membership]:
    party = Party(name)
    challenge = await call(market, api.challenge(party.peer))
    body = registration(
        party, market.peer, challenge.challenge, addresses=(f"/ip4/127.0.0.1/tcp/{len(name)}",)
    )
    return party, await call(market, api.register(body))


async def test_a_session_through_the_shared_interface(market: Market) -> None:
    info = await call(market, api.info())
    assert info.coordinator == market.peer
    buyer, membership = await join(market, "buyer")
    seller, _ = await join(market, "seller")
    assert len((await call(market, api.bootstrap())).addresses) == 2
    credited = await call(market, api.credit(credit_request(buyer, market.peer, 5_000_000)))
    assert (credited.credited_nanos, credited.currency) == (5_000_000, "TEST")
    deal = market.deal(buyer, seller, cap=1_000, fee_bps=info.fee_bps)
    grant = await call(market, api.grant(deal.grant_request()))
    account = await call(market, api.account(membership.token))
    assert (account.free_nanos, account.held_nanos) == (4_999_000, 1_000)
    waiting = await call(market, api.settle(deal.claim(buyer, grant, 400)))
    assert isinstance(waiting, api.Claimed)
    bundle = await call(market, api.settle(deal.claim(seller, grant, 400)))
    assert isinstance(bundle, bytes)
    report = receipts.verify_bundle(bundle, trusted=frozenset({market.peer}))
    assert report.verdict == "valid"
    assert report.receipt is not None
    again = await call(market, api.receipt(report.receipt.receipt, membership.token))
    assert receipts.decode_bundle(again).receipt == receipts.decode_bundle(bundle).receipt
    assert (await call(market, api.audit())).balanced


async def test_a_refusal_keeps_its_code(market: Market) -> None:
    with pytest.raises(RefusedError) as caught:
        await call(market, api.account("lum_nobody"))
    assert (caught.value.code, caught.value.money_moved) == ("unauthorized", False)
