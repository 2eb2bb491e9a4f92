"""A node answers disputes against it by itself, and disputes unpaid deliveries where it is told."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from lumaris.session import Session
from lumaris_node.config import NodeConfig, Settle
from lumaris_protocol.errors import LumarisError
from tests import market as m
from tests.bonded import balance, bonded, desk_of
from tests.market import Market, eventually, eventually_async

pytestmark = [pytest.mark.slow, pytest.mark.planet]

_EVIDENCE_S = 72 * 3600


async def test_a_dispute_against_the_node_is_answered(market: Market):
    seller = await bonded(market, "seller")
    disputes = seller.node._disputes
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await seller.assert_idle()  # what was said is on its disk
        await seller.assert_settled()
        desk = buyer.disputes
        draft = await desk.draft(result.session, "not_delivered", amount_nanos=result.cost_nanos)
        opened = await desk.open(draft)
        await disputes.look()
        status = disputes.status()
        assert (status["open"], status["answered"], status["unanswered"]) == (1, 1, 0)
        assert "Disputes open: 1" in (await seller.node.status())["status"]
        shown = await desk.show(opened.dispute)
        assert [(one.by, one.done) for one in shown.evidence[1:]] == [(seller.peer, True)]
        await disputes.look()
        assert disputes.status()["answered"] == 1, "a dispute is answered once"
        await desk.add_evidence(opened.dispute, done=True)
        ruled = await desk.show(opened.dispute)
        assert ruled.ruling is not None
        assert (ruled.ruling.rule, ruled.ruling.bond_returned) == ("delivered", False)
        await disputes.look()
        assert disputes.status()["open"] == 0
        assert disputes._after == ruled.number, "what is over is not read again"
        # Nobody is drawn yet: the owner may have to show what the checker comes to.
        opened = await desk.open(await desk.draft(result.job, "wrong_result"))
        for _ in range(2):
            await disputes.look()
            shown = await desk.show(opened.dispute)
            assert [(one.by, one.done) for one in shown.evidence[1:]] == [(seller.peer, False)]
            disputes._answered.clear()  # as after a restart
        await market.assert_balanced(buyer)


async def test_an_answer_outlives_an_outage_and_a_restart(market: Market):
    seller = await bonded(market, "seller")
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await seller.assert_idle()  # what was said is on its disk
        await seller.assert_settled()
        desk = buyer.disputes
        opened = await desk.open(
            await desk.draft(result.session, "not_delivered", amount_nanos=result.cost_nanos)
        )
        disputes = seller.node._disputes
        market.line.down = True
        with pytest.raises(LumarisError):
            await disputes.look()
        assert disputes.status()["answered"] == 0
        market.line.down = False
        market.line.lose_answers = True
        with pytest.raises(LumarisError):
            await disputes.look()
        market.line.lose_answers = False
        await disputes.look()
        seller.node.stop()
        await seller.gone.wait()
        again = await market.seller("seller")
        await again.node._disputes.look()
        shown = await desk.show(opened.dispute)
        assert [one.by for one in shown.evidence[1:]] == [seller.peer]


async def test_an_unpaid_delivery_is_disputed(market: Market, monkeypatch: pytest.MonkeyPatch):
    config = partial(NodeConfig, settle=Settle(dispute_unpaid=True))
    monkeypatch.setattr("tests.market.NodeConfig", config)
    seller = await bonded(market, "seller")
    node = seller.node
    delivered = trio.Event()
    monkeypatch.setattr(Session, "_on_delivery", lambda *_: delivered.set())
    async with market.buyer() as buyer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buyer.run, market.request(m.after(m.HELLO, 1)))
            await delivered.wait()
            market.network.kill(market.hosts.pop(buyer.key.peer_id))
            await eventually(lambda: not node._sessions.hosts, "the session has ended")
            await eventually(lambda: node._disputes._counts["opened"] == 1, "it is disputed")
            nursery.cancel_scope.cancel()
        await eventually(lambda: node._settler.last_error == "in_dispute", "the claim waits")
        assert "Settlements wait: in_dispute." in (await node.status())["status"]
        (found,) = await buyer.disputes.disputes()
        assert (found.claim, found.opener, found.state) == (
            "unpaid_delivery",
            seller.peer,
            "opened",
        )
        assert found.amount_nanos > 0
        (item,) = await node._store.unsettled()
        market.clock.ahead_s += 2
        with pytest.raises(LumarisError) as twice:
            await node._disputes.open_unpaid(item)
        assert twice.value.code == "dispute_open"
        # The buyer stays silent until the time for evidence is over.
        market.clock.ahead_s += _EVIDENCE_S
        await market.coordinator.run_chores()
        async with desk_of(market, buyer.profile.state) as desk:  # its token is renewed
            ruling = (await desk.show(found.dispute)).ruling
        assert ruling is not None
        assert (ruling.rule, ruling.award_nanos) == ("unpaid", found.amount_nanos)
        node._settler._again.clear()

        async def settled() -> bool:
            await node._settler.settle_all()
            return not await node._store.unsettled()

        await eventually_async(settled, "the award is settled")
        assert await balance(market, f"dispute:{found.dispute}:TEST") == 0
        await market.assert_balanced(buyer)


async def test_paid_work_and_a_plain_owner_are_claimed_at_once(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    config = partial(NodeConfig, settle=Settle(dispute_unpaid=True))
    monkeypatch.setattr("tests.market.NodeConfig", config)
    seller = await bonded(market, "seller")
    async with market.buyer() as buyer:
        await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await seller.assert_settled()
        assert seller.node._disputes.status()["opened"] == 0
        assert await buyer.disputes.disputes() == []
