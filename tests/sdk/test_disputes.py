"""A buyer disputes what it was sold, and has a result checked by the seller that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec import structs

from lumaris import checking
from lumaris.buyer import Buyer
from lumaris.jobs import JobRequest, JobResult, Plan
from lumaris.session import Session
from lumaris_protocol import dispute_file
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.dispute import DisputeClaim
from tests import market as m
from tests.bonded import BOND, balance, bond_of, bonded, draw, lying
from tests.market import CREDIT, Market, eventually_async

pytestmark = [pytest.mark.slow, pytest.mark.planet]

COST = 10_000_000


async def _sold(buyer: Buyer, request: JobRequest) -> JobResult:
    """A job that a seller ran, settled."""
    result = await buyer.run(request)
    assert result.ok, result
    await buyer.pool.close_all()
    await buyer.records.flush()
    return result


async def _rests(buyer: Buyer) -> bool:
    await buyer.pool.settle()
    return (await buyer.account()).held_nanos == 0


@contextmanager
def _busy_at_first(buyer: Buyer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first seller that is asked has no room; the next time it has."""
    real, refused = buyer.pool.buy_from, list[str]()

    async def buy_from(seller: str, *given: Any, **more: Any) -> Session:
        if not refused:
            refused.append(seller)
            raise LumarisError("no_offers")
        return await real(seller, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(buyer.pool, "buy_from", buy_from)
        yield
    assert refused


async def test_a_wrong_result_is_checked_and_refunded(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    sellers = [await bonded(market, name) for name in ("one", "two")]
    async with market.buyer() as buyer:
        with lying():
            result = await _sold(buyer, market.request(m.HELLO))
        assert result.stdout == b""
        honest = next(seller.peer for seller in sellers if seller.peer != result.seller)
        desk = buyer.disputes
        draft = await desk.draft(result.job, "wrong_result")
        assert (draft.order, draft.respondent) == (1, result.seller)
        assert 0 < draft.amount_nanos <= result.cost_nanos
        opened = await desk.open(draft)
        with pytest.raises(LumarisError) as early:
            await checking.due(desk, opened.dispute)
        assert early.value.code == "not_disputable"
        await draw(market, desk, opened.dispute)
        due = await checking.due(desk, opened.dispute)
        assert due.checker == honest
        with pytest.raises(LumarisError) as wrong:
            await checking.run(buyer, desk, due, image="other.wasm", max_cost_nanos=COST)
        assert wrong.value.code in ("bad_image", "bad_input")
        asked: list[str] = []

        async def approve(plan: Plan) -> bool:
            asked.append(plan.seller)
            return True

        with _busy_at_first(buyer, monkeypatch):
            done = await checking.run(
                buyer, desk, due, image=market.guest, max_cost_nanos=COST, approve=approve
            )
        assert asked == [honest]
        assert (done.dispute.state, done.ran_before) == ("settled", False)
        shown = await desk.show(opened.dispute)
        assert shown.ruling is not None
        assert (shown.ruling.rule, shown.ruling.fault) == ("result_differs", "seller")
        price = draft.amount_nanos
        assert shown.ruling.refund_nanos == price
        # At most half of what was slashed beyond the refund goes to the victim.
        assert shown.ruling.victim_nanos == (shown.ruling.collected_nanos - price) // 2
        assert await bond_of(market, result.seller) == BOND - shown.ruling.collected_nanos
        assert await bond_of(market, honest) == BOND
        assert await balance(market, f"dispute:{opened.dispute}:TEST") == 0
        data = await desk.file(opened.dispute)
        trusted = frozenset({str(market.coordinator.peer_id)})
        assert dispute_file.verify(data, trusted=trusted).verdict == "valid"
        with pytest.raises(LumarisError) as over:
            await checking.due(desk, opened.dispute)
        assert over.value.code == "dispute_closed"
        spent = sum(row["total_nanos"] for row in await buyer.store.sessions(9))
        account = await buyer.account()
        gained = shown.ruling.refund_nanos + shown.ruling.victim_nanos
        assert account.free_nanos == CREDIT - spent + gained
        await market.assert_balanced(buyer)


async def test_a_check_that_was_cut_off_is_not_bought_twice(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    for name in ("one", "two"):
        await bonded(market, name)
    async with market.buyer() as buyer:
        result = await _sold(buyer, market.request(m.HELLO))
        desk = buyer.disputes
        opened = await desk.open(await desk.draft(result.session, "wrong_result", order=1))
        await draw(market, desk, opened.dispute)
        due = await checking.due(desk, opened.dispute)

        async def cut(*_: object, **__: object) -> None:
            raise LumarisError("coordinator_unreachable")

        late = replace(due, check_by=1)
        with pytest.raises(LumarisError) as over:
            await checking.run(buyer, desk, late, image=market.guest, max_cost_nanos=COST)
        assert over.value.code == "not_disputable", "nothing is bought in vain"
        with trio.CancelScope() as ctrl_c:
            await checking.run(
                buyer,
                desk,
                due,
                image=market.guest,
                max_cost_nanos=COST,
                observe=lambda _: ctrl_c.cancel(),
            )
        assert ctrl_c.cancelled_caught
        await eventually_async(partial(_rests, buyer), "nothing is held")
        first = await checking._made(desk, due) is None  # the guest is quick
        with monkeypatch.context() as away:
            away.setattr(type(desk), "add_evidence", cut)
            with pytest.raises(LumarisError) as lost:
                await checking.run(buyer, desk, due, image=market.guest, max_cost_nanos=COST)
        assert (lost.value.code, lost.value.money_moved) == ("coordinator_unreachable", first)
        sessions = len(await buyer.store.sessions(9))
        done = await checking.run(buyer, desk, late, max_cost_nanos=COST)
        assert done.ran_before
        assert len(await buyer.store.sessions(9)) == sessions
        shown = await desk.show(opened.dispute)
        assert shown.ruling is not None
        # The claim was wrong: the opener's bond is lost.
        assert (shown.ruling.rule, shown.ruling.bond_returned) == ("result_equal", False)
        await market.assert_balanced(buyer)


async def test_what_cannot_be_claimed_costs_nothing(market: Market):
    await bonded(market, "one")
    async with market.buyer() as buyer:
        result = await _sold(buyer, market.request(m.HELLO))
        desk, before = buyer.disputes, await buyer.account()
        nobody = "a" * 24
        turns: tuple[tuple[str, DisputeClaim, int | None, str], ...] = (
            (result.job, "not_delivered", None, "evidence_insufficient"),
            (result.job, "equivocation", None, "evidence_insufficient"),
            (result.job, "unpaid_delivery", 1, "not_disputable"),
            (f"job_{nobody}", "not_delivered", None, "not_found"),
            (f"ses_{nobody}", "not_delivered", None, "not_found"),
            (result.session, "wrong_result", None, "usage"),
        )
        for name, claim, amount, code in turns:
            with pytest.raises(LumarisError) as refused:
                await desk.open(await desk.draft(name, claim, amount_nanos=amount))
            assert refused.value.code == code, (name, claim)
        assert await buyer.account() == before
        assert await desk.disputes() == []
        with pytest.raises(LumarisError) as missing:
            await desk.show(f"dsp_{nobody}")
        assert missing.value.code == "not_found"


async def test_papers_of_another_dispute_are_not_taken(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    """A coordinator that shows other papers does not have us run, or sign, something else."""
    for name in ("one", "two"):
        await bonded(market, name)
    async with market.buyer() as buyer, market.buyer("other") as other:
        desk, theirs = buyer.disputes, other.disputes
        opened = []
        for who, result in (
            (desk, await _sold(buyer, market.request(m.HELLO))),
            (theirs, await _sold(other, market.request(m.HELLO))),
        ):
            opened.append(await who.open(await who.draft(result.job, "wrong_result")))
        await draw(market, desk, opened[0].dispute)
        ours, foreign = (one.dispute for one in opened)
        papers = await theirs.file(foreign)
        with pytest.raises(LumarisError) as not_ours:
            desk.disputed_order(dispute_file.decode(papers), foreign)
        assert not_ours.value.code == "forbidden"

        async def shown(*_: object) -> bytes:
            return papers

        monkeypatch.setattr(type(desk), "file", shown)
        for ask in (checking.due(desk, ours), desk.add_evidence(ours)):
            with pytest.raises(LumarisError) as refused:
                await ask
            assert refused.value.code == "dispute_invalid"


async def test_inputs_are_found_by_content(market: Market, tmp_path: Path):
    for name in ("one", "two"):
        await bonded(market, name)
    source = tmp_path / "a"
    source.write_bytes(b"some input")
    async with market.buyer() as buyer:
        result = await _sold(buyer, market.request(m.COPY, inputs={"a": source}))
        desk = buyer.disputes
        opened = await desk.open(await desk.draft(result.job, "wrong_result"))
        await draw(market, desk, opened.dispute)
        due = await checking.due(desk, opened.dispute)
        with pytest.raises(LumarisError) as missing:
            await checking.run(buyer, desk, due, image=market.guest, max_cost_nanos=COST)
        assert missing.value.code == "bad_input"
        limits = structs.replace(due.order.limits, output_files=1)
        unlike = replace(due, order=structs.replace(due.order, limits=limits))
        with pytest.raises(LumarisError) as strange:
            await checking.run(buyer, desk, unlike, max_cost_nanos=COST)
        assert strange.value.code == "not_supported"
        moved = source.rename(tmp_path / "moved")
        done = await checking.run(
            buyer, desk, due, sources=[moved], image=market.guest, max_cost_nanos=COST
        )
        assert done.dispute.state == "settled"
