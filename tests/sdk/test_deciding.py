"""Quotes that are not taken, for whatever reason, free the sellers at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from lumaris.jobs import Plan
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import QUOTE_HOLD_S_MAX
from tests import market as m
from tests.market import Market, eventually

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def buy(market: Market, decide: Callable[[Plan], Awaitable[bool]], code: str = "") -> None:
    """Ask for a job that is not bought; every seller that held something hears it at once."""
    sellers = [await market.seller(f"seller{n}") for n in range(3)]
    async with market.buyer() as buyer:
        with trio.CancelScope() as scope:

            async def approve(plan: Plan) -> bool:
                assert len(plan.considered) == 2
                if not code:
                    scope.cancel()
                return await decide(plan)

            with pytest.raises(LumarisError) as caught:
                await buyer.run(market.request(m.HELLO), approve=approve)
            assert caught.value.code == code
        with trio.fail_after(QUOTE_HOLD_S_MAX - 2):  # before the quotes lapse by themselves
            await eventually(
                lambda: not any(seller.quotes.holds for seller in sellers), "nothing is held"
            )
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_declined(market: Market):
    async def no(plan: Plan) -> bool:
        return False

    await buy(market, no, "declined")


async def test_cancelled_while_deciding(market: Market):
    async def wait(plan: Plan) -> bool:
        await trio.sleep_forever()
        return True

    await buy(market, wait)


async def test_a_question_that_breaks(market: Market):
    async def fail(plan: Plan) -> bool:
        raise LumarisError("internal")

    await buy(market, fail, "internal")
