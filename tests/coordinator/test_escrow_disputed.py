"""What a dispute does to an escrow's money, and what no dispute can do to it."""

from __future__ import annotations

import pytest

from lumaris_coordinator.escrow import disputed
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import receipts
from lumaris_protocol.errors import LumarisError, ViolationError
from lumaris_protocol.limits import DISPUTES_PER_ESCROW_MAX
from lumaris_protocol.messages.receipt import Receipt
from tests.coordinator.builders import CAP, Deal, Market
from tests.coordinator.escrows import (
    FUNDS,
    dispute,
    end_dispute,
    end_window,
    receipt_of,
    setting,
    state_of,
)

STORES = ("sqlite", "postgres")


async def settled(market: Market, deal: Deal) -> Receipt:
    """The receipt of a settled escrow, whose file must verify."""
    name = (await state_of(market, deal, deal.seller))["receipt"]
    answer = await market.client.get(f"/v1/receipts/{name}", headers=market.bearer(deal.seller))
    report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks
    assert (await market.audit())["balanced"]
    return receipt_of(answer.content)


async def test_a_seller_that_was_heard_is_settled_with_the_ruling(market: Market) -> None:
    deal, grant = await setting(market)
    await dispute(market, deal)
    answer = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert (answer.status_code, answer.json()["state"]) == (202, "disputed")
    assert await market.free(deal.seller) == 4_750  # paid at once
    escrow = await end_dispute(market, deal, ruled=True, nanos=1_001)
    assert escrow.state == "settled"
    receipt = await settled(market, deal)
    assert (receipt.outcome, receipt.paid_nanos) == ("ruled", 6_001)
    assert await market.free(deal.seller) == receipt.seller_nanos == 6_001 - 300
    assert await market.free(deal.buyer) == FUNDS - 6_001
    again = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert again.status_code == 200


async def test_a_dispute_that_ends_at_once_takes_no_voucher_from_the_seller(
    market: Market,
) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 10))).status_code == 202
    await dispute(market, deal)
    assert (await end_dispute(market, deal, ruled=False)).state == "claimed"
    await dispute(market, deal)
    assert (await end_dispute(market, deal, ruled=True, nanos=0)).state == "claimed"
    answer = await market.settle(deal.claim(deal.seller, grant, 9_000))
    assert answer.status_code == 200, answer.text
    receipt = await settled(market, deal)
    assert (receipt.outcome, receipt.paid_nanos) == ("ruled", 9_000)


async def test_an_award_is_not_paid_again_by_a_later_voucher(market: Market) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 3_000))).status_code == 202
    await dispute(market, deal)
    await end_dispute(market, deal, ruled=True, nanos=2_000)
    assert (await market.settle(deal.claim(deal.seller, grant, 4_000))).status_code == 200
    assert (await settled(market, deal)).paid_nanos == 5_000


async def test_a_silent_seller_keeps_what_was_ruled_when_the_window_ends(market: Market) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 3_000))).status_code == 202
    await dispute(market, deal)
    await end_dispute(market, deal, ruled=True, nanos=2_000)
    await end_window(market, deal)
    receipt = await settled(market, deal)
    assert (receipt.outcome, receipt.paid_nanos) == ("ruled", 5_000)
    assert (await state_of(market, deal, deal.buyer))["state"] == "expired"


async def test_no_window_ends_a_dispute(market: Market) -> None:
    deal, grant = await setting(market)
    await dispute(market, deal)
    await end_window(market, deal)
    assert (await state_of(market, deal, deal.buyer))["state"] == "disputed"
    answer = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert (answer.status_code, answer.json()["state"]) == (202, "disputed")
    assert (await end_dispute(market, deal, ruled=False)).state == "settled"
    assert (await settled(market, deal)).paid_nanos == 5_000


async def test_both_may_close_after_a_ruling_but_not_take_back_what_was_paid(
    market: Market,
) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 3_000))).status_code == 202
    await dispute(market, deal)
    await end_dispute(market, deal, ruled=True, nanos=1_000)
    low = deal.claim(deal.seller, grant, 9_000, closes=deal.closes(3_999), total_nanos=3_999)
    assert (await market.settle(low)).json()["code"] == "already_settled"
    high = deal.claim(deal.seller, grant, 9_000, closes=deal.closes(6_000), total_nanos=6_000)
    assert (await market.settle(high)).status_code == 200
    receipt = await settled(market, deal)
    assert (receipt.outcome, receipt.paid_nanos) == ("closed", 6_000)


async def test_the_last_of_several_disputes_frees_the_rest(market: Market) -> None:
    deal, grant = await setting(market)
    await dispute(market, deal)
    await dispute(market, deal)
    assert (await market.settle(deal.claim(deal.seller, grant, 5_000))).status_code == 202
    first = await end_dispute(market, deal, ruled=True, nanos=100)
    assert (first.state, first.disputes) == ("disputed", 1)
    last = await end_dispute(market, deal, ruled=True, nanos=CAP - 5_100)
    assert (last.state, last.paid) == ("settled", CAP)
    assert (await settled(market, deal)).refund_nanos == 0


async def test_awards_and_disputes_have_bounds(market: Market) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 3_000))).status_code == 202
    await dispute(market, deal)
    with pytest.raises(LumarisError, match="no_funds"):
        await end_dispute(market, deal, ruled=True, nanos=CAP - 2_999)
    for _ in range(DISPUTES_PER_ESCROW_MAX - 1):
        await end_dispute(market, deal, ruled=True, nanos=1)
        await dispute(market, deal)
    with pytest.raises(LumarisError, match="too_many_holds"):
        await dispute(market, deal)
    assert (await state_of(market, deal, deal.buyer))["disputes_open"] == 1
    assert (await market.settle(deal.claim(deal.seller, grant, 3_000))).status_code == 202
    assert (await end_dispute(market, deal, ruled=True, nanos=1)).state == "settled"
    assert (await settled(market, deal)).paid_nanos == 3_000 + DISPUTES_PER_ESCROW_MAX


async def test_an_escrow_whose_window_has_ended_is_not_frozen(market: Market) -> None:
    deal, _ = await setting(market)
    market.clock.now = deal.agreement.ends_at + 30 * 24 * 3600 + 1
    with pytest.raises(ViolationError) as caught:
        await dispute(market, deal)
    assert caught.value.code == "already_settled"
    context, now = market.coordinator.context, market.now

    def look(connection: Connection) -> str:
        return disputed.current(context, connection, deal.hash, now=now).state

    assert await market.coordinator.store.submit(look) == "expired"
    with pytest.raises(LumarisError, match="not_found"):
        await market.coordinator.store.submit(
            lambda connection: disputed.current(context, connection, "sha256:0", now=now)
        )


async def test_a_disputed_escrow_is_an_open_one(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumaris_coordinator.gauges.METRICS_KEPT_S", 0)

    async def gauge(name: str) -> int:
        lines = (await market.client.get("/metrics")).text.splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"lumaris_{name} "))

    deal, _ = await setting(market)
    assert await gauge("escrows_open") == 1
    await dispute(market, deal)
    assert await gauge("escrows_open") == 1
    market.clock.now += 10**8  # its settle window has no timer while it is disputed
    assert await gauge("timer_overdue_seconds") == 0
