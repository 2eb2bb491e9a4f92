"""Requests that come twice, at once, out of order, too late or forged, and clocks that jump: money
rests where it belongs on both databases."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import trio

from lumaris_coordinator.clock import SteadyClock
from tests.coordinator import faults
from tests.coordinator.builders import START, Clock, Market
from tests.coordinator.conftest import open_market
from tests.coordinator.escrows import setting, state_of
from tests.coordinator.faults.invariants import Told, hold, states
from tests.coordinator.test_escrow_refused import refused_claims

STORES = ("sqlite", "postgres")
HOUR = 3_600


def check(market: Market, told: Told) -> None:
    hold(market.coordinator.settings, told, coordinator=market.peer)


@pytest.mark.slow
async def test_requests_that_come_twice_and_at_once_are_one(market: Market) -> None:
    told = Told()
    claims = await told.claims(market, 4)
    grants = list(told.grants) * 5
    answers: list[bytes] = []

    async def grant(body: bytes) -> None:
        answers.append((await market.client.post("/v1/grants", content=body)).content)

    many = claims * 8
    random.Random(5).shuffle(many)
    async with trio.open_nursery() as nursery:
        for claim in many:
            nursery.start_soon(told.settle, market, claim)
        for body in grants:
            nursery.start_soon(grant, body)
    assert len(told.receipts) == len(claims)
    assert not told.refused
    assert set(answers) == set(told.grants.values())
    await told.again(market)
    check(market, told)


@pytest.mark.slow
async def test_hostile_claims_among_good_ones_move_nothing(market: Market) -> None:
    """Forged, foreign, over the cap, of another domain, stale: all of them while others settle."""
    told = Told()
    claims = await told.claims(market, 4)
    deal, grant = await setting(market, "-prey")
    told.grants[deal.grant_request()] = grant
    # The seller's claim of less than the buyer has shown already is stale, and no refusal.
    assert (await market.settle(deal.claim(deal.buyer, grant, 5_000))).status_code == 202
    hostile = [body for body, _, _ in refused_claims(deal, grant).values()]
    stale = deal.claim(deal.buyer, grant, 4_000)
    bodies = [*hostile, *claims, stale]
    random.Random(7).shuffle(bodies)

    async def send(body: bytes) -> None:
        if body in claims:
            await told.settle(market, body)
            return
        answer = await market.settle(body)
        assert answer.status_code == 202 if body == stale else answer.status_code >= 400
        assert body == stale or answer.json()["money_moved"] is False

    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(send, body)
    assert len(told.receipts) == len(claims)
    found = await state_of(market, deal, deal.buyer)
    assert (found["state"], found["vouchered_nanos"]) == ("claimed", 5_000)
    assert await market.free(deal.seller) == 0
    check(market, told)


@pytest.mark.slow
async def test_a_claim_that_comes_too_late_takes_nothing_back(market: Market) -> None:
    told = Told()
    (late, *_) = await told.claims(market, 2)
    market.clock.now = told.deals[late].agreement.ends_at + 30 * 24 * HOUR + 1
    await market.coordinator.escrows.expire_due()
    await told.settle(market, late)
    assert [answer.json()["code"] for answer in told.refused] == ["already_settled"]
    assert states(market.coordinator.settings, [late], told) == ["expired"]
    check(market, told)


class Jumping(Clock):
    """The clock of the program, over a wall clock that somebody moves."""

    def __init__(self) -> None:
        self.passed, self.off = 0.0, 0.0
        self.start()

    def start(self) -> None:
        """The program starts: it knows the wall clock and nothing else."""
        self._steady = SteadyClock(lambda: START + self.passed + self.off, lambda: self.passed)

    def __call__(self) -> float:
        return self._steady()

    @property
    def now(self) -> float:  # type: ignore[override]
        return self()

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.passed += seconds


@pytest.mark.slow
@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_a_clock_that_jumps_crosses_no_deadline(
    tmp_path: Path, database: str, jump: int
) -> None:
    """A minute before a window ends the clock of the machine is moved by an hour; somebody who
    claims in time by the true clock is paid, and one who does not loses the window once."""
    told, clock = Told(), Jumping()
    async with open_market(tmp_path / "state", clock=clock, database=database) as market:
        claims = await told.claims(market, 2)
        ends = max(told.deals[claim].agreement.ends_at for claim in claims) + 30 * 24 * HOUR
        while clock() < ends - 60:  # the coordinator is up all the time, and says so
            clock.advance(min(24.0 * HOUR, ends - 60 - clock()))
            await market.coordinator.run_chores()
        clock.off = jump
        seen = clock()
        for _ in range(3):
            clock.advance(10)
            await market.coordinator.run_chores()
            assert seen < clock()
            seen = clock()
        await told.settle(market, claims[0])
        check(market, told)
        clock.advance(100)
        await market.coordinator.run_chores()
        await told.settle(market, claims[1])
        assert [answer.json()["code"] for answer in told.refused] == ["already_settled"]
        assert states(market.coordinator.settings, claims, told) == ["settled", "expired"]
        check(market, told)
    # Somebody starts the program again while the clock is still wrong.
    clock.start()
    async with open_market(tmp_path / "state", clock=clock, database=database) as market:
        await told.again(market)
        check(market, told)


def test_every_test_of_the_table_exists() -> None:
    here = Path(__file__).parent
    rows = re.findall(r"\| (\S+\.py)::(\w+) \|\n", faults.__doc__ or "")
    assert len(rows) > 30
    for file, name in rows:
        folder = here.parents[1] if "/" in file else here
        assert re.search(rf"^(async )?def {name}\(", (folder / file).read_text(), re.MULTILINE), (
            name
        )
