"""Whom the coordinator no longer vouches for gets no quotes, and is not asked for any."""

from __future__ import annotations

import pytest
import trio

from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.notice import Revocations
from tests import market as m
from tests.market import Market, eventually

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def revoke(market: Market, peer: str, *, whole: bool) -> bytes:
    """As an operator does; the document that is gossiped."""
    held = market.coordinator.revocations

    def operation(connection: Connection) -> None:
        row = first(connection, "SELECT serial FROM peer WHERE peer = ?", (peer,))
        assert row is not None
        held.revoke(connection, [(peer, 0 if whole else row[0])], reason="test")

    await market.coordinator.store.submit(operation)
    return await held.newest()


async def test_a_buyer_whose_certificate_is_revoked_gets_no_quote(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        (peer,) = set(market.hosts) - {seller.peer}
        notice = await revoke(market, peer, whole=False)
        await market.hosts[seller.peer].publish_notice(notice)
        await eventually(lambda: len(seller.node._notices.revoked) == 1, "the node has heard it")
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "revoked"
        assert seller.node._desk.counts["revoked"] >= 1
        await seller.assert_idle()


async def test_a_revoked_seller_leaves_the_buyers_view(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        assert buyer.market.adverts
        notice = await revoke(market, seller.peer, whole=True)
        (peer,) = set(market.hosts) - {seller.peer}
        await market.hosts[peer].publish_notice(notice)
        await eventually(lambda: not buyer.market.adverts, "the seller is gone")


async def test_a_node_asks_for_what_gossip_did_not_bring(market: Market):
    async with market.buyer():
        (peer,) = market.hosts
        assert await revoke(market, peer, whole=False)
        seller = await market.seller()
        await eventually(lambda: len(seller.node._notices.revoked) == 1, "the node has asked")
        async with market.hosts[peer].notices() as notices:
            with trio.fail_after(m.WAIT_S):
                while (said := await notices.receive()).kind != Revocations.TYPE:
                    pass  # the list of keys goes around as well
        assert said.seq == 1
