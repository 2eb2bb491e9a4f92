"""A real node answers a real buyer's demand, and the ordinary purchase follows."""

from __future__ import annotations

import pytest

from lumaris.pool import LEASE_S
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.negotiation import Requirements
from tests import market as m
from tests.market import Market

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def test_a_demand_finds_a_seller_the_buyer_lost_sight_of(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        buyer.market._index.remove(seller.peer)
        needs = Requirements(
            resources=Resources(cpu_millis=500),
            tier="wasm",
            currency=buyer.standing.info.currency,
        )
        assert await buyer.market._demands.ask(needs, LEASE_S)
        assert [item.message.seller for item in buyer.market.adverts] == [seller.peer]
        assert seller.node._tenders.counts == {"answered": 1}
        assert not await buyer.market._demands.ask(needs, LEASE_S), "it is still open"
        result = await buyer.run(market.request(m.HELLO))
        assert result.ok, result
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)
