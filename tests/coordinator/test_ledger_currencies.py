"""Money of several currencies: side by side, never one for the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumaris_coordinator.ledger import store
from lumaris_coordinator.ledger.store import Leg, open_account, open_wallet, wallet
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import receipts
from tests.coordinator.builders import CAP, Market, Party
from tests.coordinator.conftest import open_market

STORES = ("sqlite", "postgres")


@pytest.fixture
async def market(tmp_path: Path, database: str) -> AsyncIterator[Market]:
    currencies = ("TEST", "EUR")
    async with open_market(tmp_path / "state", database=database, currencies=currencies) as found:
        yield found


async def give(market: Market, party: Party, amount: int, currency: str) -> None:
    """Money from outside, as an adapter books it."""
    owner = (await market.account(party))["account"]

    def operation(connection: Connection) -> None:
        outside = open_account(
            connection, owner="external:bank", kind="external", currency=currency, may_negative=True
        )
        legs = [Leg(outside, open_wallet(connection, owner, currency), amount)]
        store.move(connection, kind="deposit", ref="", legs=legs, now=market.now)

    await market.coordinator.store.submit(operation)


async def wallets(market: Market, party: Party) -> dict[str, tuple[int, int]]:
    found = (await market.account(party))["wallets"]
    return {one["currency"]: (one["free_nanos"], one["held_nanos"]) for one in found}


async def test_a_session_in_another_currency(market: Market) -> None:
    buyer, seller = await market.party("buyer", 3 * CAP), await market.party("seller")
    await give(market, buyer, 2 * CAP, "EUR")
    deal = market.deal(buyer, seller, changes={"currency": "EUR"})
    grant = await market.grant(deal)
    assert await wallets(market, buyer) == {"TEST": (3 * CAP, 0), "EUR": (CAP, CAP)}
    answer = await market.settle(deal.claim(seller, grant, 10_000))
    assert answer.status_code == 200, answer.text
    report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
    assert report.receipt is not None
    assert (report.verdict, report.receipt.currency) == ("valid", "EUR")
    assert await wallets(market, buyer) == {"TEST": (3 * CAP, 0), "EUR": (2 * CAP - 10_000, 0)}
    assert await wallets(market, seller) == {"TEST": (0, 0), "EUR": (9_500, 0)}
    for currency, number in (("EUR", 1), ("TEST", 0)):
        page = await market.client.get(
            f"/v1/accounts/me/transfers?currency={currency}", headers=market.bearer(seller)
        )
        assert len(page.json()["transfers"]) == number
    audit = await market.audit()
    assert audit["balanced"]
    assert audit["sums_nanos"] == {"TEST": 0, "EUR": 0}


async def test_money_of_one_currency_does_not_pay_another(market: Market) -> None:
    buyer, seller = await market.party("buyer", 3 * CAP), await market.party("seller")
    deal = market.deal(buyer, seller, changes={"currency": "EUR"})
    answer = await market.client.post("/v1/grants", content=deal.grant_request())
    assert (answer.status_code, answer.json()["code"]) == (402, "no_funds")
    assert await wallets(market, buyer) == {"TEST": (3 * CAP, 0)}
    unknown = market.deal(buyer, seller, changes={"currency": "USD"})
    answer = await market.client.post("/v1/grants", content=unknown.grant_request())
    assert answer.json()["code"] == "terms_refused"


async def test_no_leg_joins_two_currencies(market: Market) -> None:
    ann, ben = await market.party("ann", CAP), await market.party("ben")
    owners = [(await market.account(party))["account"] for party in (ann, ben)]

    def exchange(connection: Connection) -> None:
        legs = [Leg(wallet(owners[0], "TEST"), open_wallet(connection, owners[1], "EUR"), 1)]
        store.move(connection, kind="settle", ref="", legs=legs, now=0)

    def backwards(connection: Connection) -> None:
        legs = [Leg(wallet(owners[0], "TEST"), wallet(owners[1], "TEST"), -1)]
        store.move(connection, kind="settle", ref="", legs=legs, now=0)

    for operation in (exchange, backwards):
        with pytest.raises(ValueError, match="no leg"):
            await market.coordinator.store.submit(operation)
    assert await market.free(ann) == CAP
    assert (await market.audit())["balanced"]
