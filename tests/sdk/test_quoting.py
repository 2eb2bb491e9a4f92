"""Whom a buyer asks, how long it waits, what it takes, and that the rest is let go."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from lumaris.quoting import Offered, Round, spread, subnet_of
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.matching import Match
from tests.protocol import parties as p

KEYS = [p.key_of(f"seller {n}") for n in range(80)]


def match(n: int, price: int = 0, *, account: str = "", address: str = "") -> Match:
    key = KEYS[n]
    owner = p.id_of("account", account or f"owner {n}")
    advert = p.advert(
        seller=key.peer_id,
        certificate=p.certificate(key, "seller", account=owner).data,
        addresses=(address or f"/ip4/8.8.{n}.1/tcp/4001/p2p/{key.peer_id}",),
    )
    return Match(advert, price, False)


class Sellers:
    """Sellers that answer, or do not, and what became of their quotes."""

    def __init__(self, prices: Sequence[int]) -> None:
        self.matches = [match(n, price) for n, price in enumerate(prices)]
        self.delays: dict[int, float] = {}
        self.refusing: set[int] = set()
        self.asked: list[int] = []
        self.declined: list[int] = []
        self.given: dict[int, Any] = {}

    def number(self, asked: Match) -> int:
        return self.matches.index(asked)

    async def ask(self, asked: Match) -> Offered:
        n = self.number(asked)
        self.asked.append(n)
        await trio.sleep(self.delays.get(n, 0.01))
        if n in self.refusing:
            raise RefusedError("no_capacity", f"seller {n}")

        async def decline() -> None:
            await trio.lowlevel.checkpoint()
            self.declined.append(n)

        offered = SimpleNamespace(
            n=n,
            price_nanos=asked.lease_nanos,
            quote=SimpleNamespace(message=SimpleNamespace(seller=asked.advert.message.seller)),
            decline=decline,
        )
        return cast(Offered, offered)

    async def round(self, count: int = 1, *, shown: int = 100) -> list[int]:
        def more(asked: frozenset[str]) -> Sequence[Match]:
            left = [m for m in self.matches if m.advert.message.seller not in asked]
            return left[:shown]

        offered = await Round(self.ask, self.matches[:shown], more, count=count).run()
        return [cast(Any, item).n for item in offered]


async def test_the_best_are_asked_and_the_cheapest_wins(autojump_clock: MockClock) -> None:
    sellers = Sellers([1, 2, 3, 4, 5])
    sellers.delays[0] = 0.03  # slower, but within the grace
    assert await sellers.round() == [0]
    assert sorted(sellers.asked) == [0, 1, 2]
    assert sorted(sellers.declined) == [1, 2]


async def test_nobody_waits_for_sellers_that_ask_for_more(autojump_clock: MockClock) -> None:
    sellers = Sellers([1, 2, 3])
    sellers.delays |= {1: 2.0, 2: 2.0}
    began = trio.current_time()
    assert await sellers.round() == [0]
    assert trio.current_time() - began == pytest.approx(0.01)
    assert sellers.declined == []


async def test_a_cheaper_one_is_waited_for_only_a_moment(autojump_clock: MockClock) -> None:
    sellers = Sellers([1, 2, 3])
    sellers.delays[0] = 2.0
    began = trio.current_time()
    assert await sellers.round() == [1]
    assert trio.current_time() - began < 0.1
    assert sellers.declined == [2]


async def test_silent_sellers_are_overtaken_one_by_one(autojump_clock: MockClock) -> None:
    sellers = Sellers(range(8))
    sellers.delays |= dict.fromkeys(range(5), 60.0)
    began = trio.current_time()
    assert await sellers.round() == [5]
    # Three at once, then one after each of three waits of 0.15 s, then the grace.
    assert trio.current_time() - began == pytest.approx(0.45 + 0.01 + 0.05)
    assert sorted(sellers.asked) == [0, 1, 2, 3, 4, 5]


async def test_refusals_are_made_up_for_at_once(autojump_clock: MockClock) -> None:
    sellers = Sellers(range(10))
    sellers.refusing = set(range(7))
    began = trio.current_time()
    assert sorted(await sellers.round(2)) == [7, 8]
    assert trio.current_time() - began < 0.15


async def test_more_sellers_are_named_when_all_shown_refuse(autojump_clock: MockClock) -> None:
    sellers = Sellers(range(12))
    sellers.refusing = set(range(10))
    assert await sellers.round(shown=4) == [10]


async def test_the_last_refusal_is_the_answer(autojump_clock: MockClock) -> None:
    sellers = Sellers(range(80))
    sellers.refusing = set(range(80))
    with pytest.raises(RefusedError, match="no_capacity"):
        await sellers.round()
    assert len(sellers.asked) == 64
    with pytest.raises(LumarisError, match="no_offers"):
        await Sellers([]).round()


async def test_fewer_than_wanted_is_better_than_none(autojump_clock: MockClock) -> None:
    sellers = Sellers([1, 2, 3])
    sellers.refusing = {1}
    assert await sellers.round(3) == [0, 2]
    assert sellers.declined == []


@pytest.mark.parametrize("after_s", [0.005, 0.015, 0.02, 1.0])
async def test_nothing_is_held_after_a_cancel(autojump_clock: MockClock, after_s: float) -> None:
    sellers = Sellers(range(6))
    sellers.delays |= {0: 0.012, 1: 0.018} | dict.fromkeys(range(2, 6), 60.0)
    with trio.move_on_after(after_s) as scope:
        await sellers.round(4)
    assert scope.cancelled_caught
    assert sorted(sellers.declined) == [n for n in (0, 1) if sellers.delays[n] < after_s]


# --- whom to ask first ---


def order(matches: list[Match]) -> list[int]:
    return [matches.index(item) for item in spread(matches)]


def test_one_of_each_subnet_comes_first() -> None:
    near = [match(n, address=f"/ip4/8.8.8.{n}/tcp/1") for n in range(3)]
    six = [match(n, address=f"/ip6/2606:4700:{n}::1/tcp/1") for n in (3, 4)]
    same = match(5, address="/ip6/2606:4700:3:9::1/tcp/1")
    assert order([*near, *six, same]) == [0, 3, 4, 1, 2, 5]


def test_one_of_each_owner_comes_first() -> None:
    assert order([match(0, account="a"), match(1, account="a"), match(2, account="b")]) == [0, 2, 1]


def test_on_one_machine_everybody_is_asked() -> None:
    local = [match(n, address=f"/ip4/127.0.0.1/tcp/{n + 1}") for n in range(4)]
    assert order(local) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("addresses", "subnet"),
    [
        (("/ip4/8.8.4.4/tcp/1/p2p/x",), "8.8.4.0/24"),
        (("/ip4/192.168.1.2/tcp/1", "/ip4/8.8.4.4/tcp/1"), "8.8.4.0/24"),
        (("/ip4/8.8.4.4/tcp/1/p2p/x/p2p-circuit/p2p/y",), ""),
        (("/ip6/2606:4700:1:2::1/tcp/1",), "2606:4700:1::/48"),
        (("/ip4/10.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip4/999.1.1.1/tcp/1"), ""),
        (("", "/", "/ip4", "/ip4/", "no address", "/dns4/host/tcp/1"), ""),
        ((), ""),
    ],
)
def test_subnets(addresses: tuple[str, ...], subnet: str) -> None:
    assert subnet_of(p.advert(addresses=addresses).message) == subnet
