"""The books of each provider are compared with the ledger, and a difference stops its payouts."""

from __future__ import annotations

from lumaris_coordinator import bounds
from lumaris_coordinator.ledger.store import wallet
from lumaris_coordinator.money.reconciliation import DAY_S, check
from lumaris_coordinator.store.port import Connection, all_rows
from tests.coordinator.builders import Market
from tests.coordinator.conformance_adapter import Provider
from tests.coordinator.test_money import MIN, account_of, ask, bank, due, payout_request, show

__all__ = ["bank"]

STORES = ("sqlite", "postgres")


async def test_books_that_agree_are_compared_once_a_day(bank: tuple[Market, Provider]) -> None:
    market, provider = bank
    await market.party("ann", 10 * MIN)
    reconciliation = market.coordinator.money.reconciliation
    for _ in range(3):
        await reconciliation.round()
    assert provider.calls.count("total") == 1
    market.clock.now += DAY_S
    await reconciliation.round()
    assert provider.calls.count("total") == 2
    rows = await reconciliation.listed(before=None, limit=3)
    assert [row["adapter"] for row in rows["reconciliations"]] == [
        "bank",
        "test-credit",
        "bank",
    ]
    assert rows["next"] == 2
    assert {row["difference_nanos"] for row in rows["reconciliations"]} == {0}
    store = market.coordinator.store
    assert await store.scan(lambda connection: list(check(connection))) == []


async def test_money_under_way_is_no_difference(bank: tuple[Market, Provider]) -> None:
    market, provider = bank
    ann = await market.party("ann", 10 * MIN)
    provider.receive(await account_of(market, ann), 10 * MIN)
    await market.coordinator.money.deposits.round()
    provider.slow = True
    await ask(market, payout_request(ann, market.peer, 4 * MIN, adapter="bank"))
    await market.coordinator.money.payouts.round()
    compare = market.coordinator.money.reconciliation.compare
    before = await compare(provider)
    provider.finish()  # it has paid, and the ledger has not heard of it
    after = await compare(provider)
    assert before is not None
    assert after is not None
    assert (before["difference_nanos"], before["pending_nanos"]) == (0, 0)
    assert (after["difference_nanos"], after["pending_nanos"]) == (0, -4 * MIN)


async def test_a_difference_stops_the_payouts_of_that_adapter_only(
    bank: tuple[Market, Provider],
) -> None:
    market, provider = bank
    ann = await market.party("ann", 10 * MIN)
    money = market.coordinator.money
    waiting = await ask(market, payout_request(ann, market.peer, MIN, adapter="bank"))
    provider.total = 1  # a nano that nobody wrote down
    await money.reconciliation.round()
    assert ("reconciliation_differences", "gauge", 1) in money.reconciliation.gauges()
    await money.payouts.round()
    assert (await show(market, ann, waiting["payout"]))["state"] == "held"
    refused = await ask(
        market, payout_request(ann, market.peer, MIN, adapter="bank", nonce="1" * 32)
    )
    assert refused["code"] == "payouts_frozen"
    other = await ask(market, payout_request(ann, market.peer, MIN, nonce="2" * 32))
    await due(market)
    assert (await show(market, ann, other["payout"]))["state"] == "paid"
    wrong = await market.coordinator.store.scan(lambda connection: list(check(connection)))
    assert wrong == ["bank (TEST) differs from the ledger by 1 nanos"]
    provider.total = 0
    market.clock.now += bounds.RECONCILE_RETRY_S
    await money.reconciliation.round()
    await due(market)
    assert (await show(market, ann, waiting["payout"]))["state"] == "paid"


async def test_a_changed_ledger_is_found(bank: tuple[Market, Provider]) -> None:
    market, _ = bank
    await market.party("ann", 10 * MIN)
    account = wallet("external:test-credit", "TEST")

    def tamper(connection: Connection) -> None:
        connection.execute("UPDATE account SET balance = balance - 7 WHERE id = ?", (account,))

    await market.coordinator.store.submit(tamper)
    await market.coordinator.money.reconciliation.round()
    adapter = market.coordinator.money.adapters["test-credit", "TEST"]
    found = await market.coordinator.money.reconciliation.compare(adapter)
    assert found is not None
    assert found["difference_nanos"] == -7


async def test_the_chores_follow_deposits_and_compare(market: Market) -> None:
    await market.party("ann", 10 * MIN)
    for _ in range(2):
        await market.coordinator.money.run_chores()
    rows = await market.coordinator.store.read(
        lambda connection: all_rows(connection, "SELECT adapter, amount, state FROM deposit")
    )
    assert rows == [("test-credit", 10 * MIN, "credited")]
    found = await market.coordinator.money.reconciliation.listed(before=None, limit=1)
    assert found["next"] is None
    assert (found["reconciliations"][0]["provider_nanos"]) == 10 * MIN
    gauges = {name: value for name, _, value in market.coordinator.money.reconciliation.gauges()}
    assert gauges == {"reconciliation_differences": 0, "reconciliation_age_seconds": 0}
