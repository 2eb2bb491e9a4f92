"""A peer that is revoked in the middle of a session: both sides end it, and each would alone."""

from __future__ import annotations

import time

import pytest
import trio

from lumaris.buyer import Buyer
from lumaris_node.sessions import Sessions
from lumaris_protocol import codec, envelope
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.notice import Revocations
from tests import market as m
from tests.market import Market, Seller, eventually
from tests.node.test_money import Job, paid, settled_at_coordinator
from tests.node.test_notices import revoke

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def revoked_while_it_runs(market: Market, seller: Seller, buyer: Buyer, peer: str) -> Job:
    """A job that would not end by itself, and whose peer is revoked once it prints."""
    job = Job()
    with trio.fail_after(m.WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, buyer, market.request(m.WAIT, attempts=1))
            await job.said.wait()
            notice = await revoke(market, peer, whole=True)
            await market.hosts[seller.peer].publish_notice(notice)
            await job.ended.wait()
    return job


def ignored(*_: object) -> None:
    """Not heard by this side."""


async def test_a_buyer_sends_nothing_more_to_a_revoked_seller(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Sessions, "end_revoked", ignored)
    seller = await market.seller()
    async with market.buyer() as buyer:
        assert (await buyer.run(market.request(m.HELLO))).ok  # in the session that is revoked
        vouchered = await paid(buyer)
        job = await revoked_while_it_runs(market, seller, buyer, seller.peer)
        assert job.result is not None
        assert job.result.reason == "seller_lost"
        assert "vouches" in job.result.detail
        assert await paid(buyer) == vouchered > 0
        await eventually(lambda: not buyer.pool._sessions, "the session is closed")
        await settled_at_coordinator(market, buyer)
        assert (await buyer.account()).free_nanos == m.CREDIT - vouchered


async def test_a_seller_takes_nothing_more_of_a_revoked_buyer(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        buyer.market.on_revoked = ignored
        assert (await buyer.run(market.request(m.HELLO))).ok
        vouchered = await paid(buyer)
        job = await revoked_while_it_runs(market, seller, buyer, buyer.key.peer_id)
        assert job.result is not None
        assert job.result.reason == "seller_lost"
        assert await paid(buyer) == vouchered
        await seller.assert_idle()
        await seller.assert_settled()
        await market.assert_balanced(buyer)


async def test_work_goes_on_with_another_seller(market: Market):
    one = await market.seller("one")
    async with market.buyer() as buyer:
        assert (await buyer.run(market.request(m.HELLO))).ok
        other = await market.seller("other")
        await eventually(lambda: len(buyer.market.adverts) == 2, "both are seen")
        job = Job()
        with trio.fail_after(m.WAIT_S):
            async with trio.open_nursery() as nursery:
                request = market.request(m.WAIT, wall_s=1, attempts=2)
                nursery.start_soon(job.run, buyer, request)
                await job.said.wait()
                notice = await revoke(market, one.peer, whole=True)
                await market.hosts[other.peer].publish_notice(notice)
                await job.ended.wait()
        assert job.result is not None
        assert (job.result.seller, job.result.attempts) == (other.peer, 2)
        await one.assert_idle()  # it has heard of itself
        assert not one.node._sessions.hosts


async def test_an_agreement_with_a_revoked_buyer_opens_no_session(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        notice = await revoke(market, buyer.key.peer_id, whole=True)
        found = seller.node._notices.revoked
        desk, sessions = seller.node._desk, seller.node._sessions
        check = sessions._is_revoked

        def just_now(agreement: Agreement) -> bool:
            """The notice comes between the agreement and the session."""
            payload = envelope.decode(notice).payload
            found.add(codec.decode_payload(payload, Revocations), time.time())
            return check(agreement)

        sessions._is_revoked = just_now  # type: ignore[method-assign]
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "revoked"
        assert desk.counts.get("agreed", 0) <= 1
        await seller.assert_idle()
