"""Money adds up, cannot be rewritten, and test credit has an end."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import pytest
import trio

from lumaris_coordinator import bounds
from lumaris_coordinator.ledger import service, store
from lumaris_coordinator.ledger.store import TEST_CREDIT, Leg, wallet
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.money import NANOS_PER_CREDIT
from tests.coordinator.builders import Market, credit_request, key_of
from tests.coordinator.postgres import INTEGRITY

LIMIT = 1_000 * NANOS_PER_CREDIT
MIN = bounds.CREDIT_NANOS_MIN
STORES = ("sqlite", "postgres")


async def test_credit_is_given_once_per_nonce(market: Market) -> None:
    ann = await market.party("ann")
    body = credit_request(ann, market.peer, 700 * MIN)
    answers = set()

    async def ask() -> None:
        answer = await market.client.post("/v1/credits", content=body)
        assert answer.json()["credited_nanos"] == 700 * MIN
        answers.add(answer.content)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(ask)
    # Whoever has the bytes gets the answer: it stays the same, and is no look at the wallet.
    await market.fund(ann, MIN)
    await ask()
    assert len(answers) == 1
    assert b"free_nanos" not in answers.pop()
    audit = await market.audit()
    assert (audit["balanced"], audit["transfers"], audit["sum_nanos"]) == (True, 2, 0)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("over the limit", "credit_limit"),
        ("nothing", "usage"),
        ("less than the least", "usage"),
        ("same nonce, other amount", "idempotency_mismatch"),
        ("stranger", "not_certified"),
        ("stale", "expired"),
        ("another coordinator", "wrong_domain"),
    ],
)
async def test_credit_refused(market: Market, case: str, code: str) -> None:
    ann = await market.party("ann")
    first = credit_request(ann, market.peer, 100 * MIN, nonce="0" * 32)
    assert (await market.client.post("/v1/credits", content=first)).status_code == 200
    coordinator = key_of("eve").peer_id if case == "another coordinator" else market.peer
    amounts = {
        "over the limit": LIMIT - 100 * MIN + 1,
        "nothing": 0,
        "less than the least": MIN - 1,
    }
    amount = amounts.get(case, 50 * MIN)
    nonce = "0" * 32 if case == "same nonce, other amount" else None
    party = type(ann)("eve") if case == "stranger" else ann
    now = market.now - (361 if case == "stale" else 0)
    body = credit_request(party, coordinator, amount, nonce=nonce, now=now)
    answer = await market.client.post("/v1/credits", content=body)
    assert answer.json()["code"] == code, answer.text
    assert answer.json()["money_moved"] is False
    assert await market.free(ann) == 100 * MIN


async def test_credits_of_an_account_are_few(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CREDITS_PER_ACCOUNT_MAX", 3)
    ann, ben = await market.party("ann"), await market.party("ben", MIN)
    first = credit_request(ann, market.peer, MIN)
    assert (await market.client.post("/v1/credits", content=first)).status_code == 200
    for _ in range(2):
        await market.fund(ann, MIN)
    more = credit_request(ann, market.peer, MIN)
    answer = await market.client.post("/v1/credits", content=more)
    assert answer.json()["code"] == "credit_limit"
    assert (await market.client.post("/v1/credits", content=first)).status_code == 200
    await market.fund(ben, MIN)
    assert [await market.free(party) for party in (ann, ben)] == [3 * MIN, 2 * MIN]
    assert (await market.audit())["transfers"] == 5


async def test_transfers_come_in_pages(market: Market) -> None:
    ann = await market.party("ann")
    for amount in range(1, 6):
        await market.fund(ann, amount * MIN)
    await market.party("ben", 99 * MIN)
    seen: list[int] = []
    after: int | None = 0
    while after is not None:
        answer = await market.client.get(
            f"/v1/accounts/me/transfers?after={after}&limit=2", headers=market.bearer(ann)
        )
        page = answer.json()
        seen += [transfer["amount_nanos"] for transfer in page["transfers"]]
        after = page["next"]
        assert len(seen) <= 5
    assert seen == [n * MIN for n in (1, 2, 3, 4, 5)]


async def test_an_account_cannot_be_overdrawn(market: Market) -> None:
    ann, ben = await market.party("ann", 10 * MIN), await market.party("ben")
    accounts = [wallet((await market.account(party))["account"], "TEST") for party in (ann, ben)]

    def overdraw(connection: Connection) -> None:
        legs = [Leg(accounts[0], accounts[1], amount) for amount in (6 * MIN, 6 * MIN)]
        store.move(connection, kind="settle", ref="", legs=legs, now=0)

    def cheat(connection: Connection) -> None:
        connection.execute("UPDATE account SET balance = -1 WHERE id = ?", (accounts[0],))

    with pytest.raises(LumarisError, match="no_funds"):
        await market.coordinator.store.submit(overdraw)
    with pytest.raises(INTEGRITY):
        await market.coordinator.store.submit(cheat)
    assert [await market.free(party) for party in (ann, ben)] == [10 * MIN, 0]
    assert (await market.audit())["transfers"] == 1


async def test_an_account_changes_by_what_all_legs_give_and_take(market: Market) -> None:
    submit, choice = market.coordinator.store.submit, Random(7)
    source, *names = [wallet(TEST_CREDIT, "TEST"), *(f"acc_{letter}:TEST" for letter in "abcd")]
    balances = dict.fromkeys([source, *names], 0)

    def open_all(connection: Connection) -> None:
        for name in names:
            store.open_wallet(connection, name.partition(":")[0], "TEST")

    await submit(open_all)
    written: list[tuple[int, str, str, int]] = []
    refused = 0
    for _ in range(40):
        pairs = [choice.sample([source, *names], 2) for _ in range(choice.randrange(6))]
        legs = [Leg(one, other, choice.choice((0, 1, 2, 5, 9))) for one, other in pairs]
        after = dict(balances)
        for leg in legs:
            after[leg.debit] -= leg.amount_nanos
            after[leg.credit] += leg.amount_nanos
        operation = partial(store.move, kind="settle", ref="", legs=iter(legs), now=0)
        if min(after[name] for name in names) < 0:
            refused += 1
            with pytest.raises(LumarisError, match="no_funds"):
                await submit(operation)
            continue
        txn, balances = await submit(operation), after
        written += [(txn, leg.debit, leg.credit, leg.amount_nanos) for leg in legs]
    assert 0 < refused < 40

    def look(connection: Connection) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
        rows = all_rows(
            connection, "SELECT id, txn, debit, credit, amount, currency FROM transfer ORDER BY id"
        )
        return {name: store.balance(connection, name) for name in balances}, rows

    found, rows = await market.coordinator.store.read(look)
    assert found == balances
    kept = [row for row in written if row[3]]
    assert rows == [(n, *row, "TEST") for n, row in enumerate(kept, 1)]
    assert (await market.audit())["balanced"]


async def test_a_leg_needs_both_its_accounts_and_one_currency(market: Market) -> None:
    submit, source = market.coordinator.store.submit, wallet(TEST_CREDIT, "TEST")
    ann = wallet((await market.account(await market.party("ann", 9 * MIN)))["account"], "TEST")
    move = partial(store.move, kind="settle", ref="", now=0)
    for leg, error in (
        (Leg(source, "acc_nobody:TEST", 1), INTEGRITY),
        (Leg("acc_nobody:TEST", ann, 1), (*INTEGRITY, LumarisError)),
        (Leg(ann, "acc_nobody:OTHER", 1), ValueError),
        (Leg(ann, source, -1), ValueError),
    ):
        with pytest.raises(error):
            await submit(partial(move, legs=[Leg(source, ann, 5), leg]))
    audit = await market.audit()
    assert (audit["balanced"], audit["transfers"]) == (True, 1)


@pytest.mark.parametrize(
    "column",
    ["txn.id", "transfer.id", "escrow_event.n", "receipt.leaf", "checkpoint.size", "downtime.id"],
)
async def test_history_cannot_be_rewritten(market: Market, column: str) -> None:
    buyer, seller = await market.party("buyer", MIN), await market.party("seller")
    deal = market.deal(buyer, seller, cap=5_000)
    answer = await market.settle(deal.claim(seller, await market.grant(deal), 10))
    assert answer.status_code == 200

    def add_downtime(connection: Connection) -> None:
        connection.execute("INSERT INTO downtime (id, since, until) VALUES (1, 1, 2)")

    await market.coordinator.store.submit(add_downtime)
    table, _, number = column.partition(".")
    for sql in (f"UPDATE {table} SET {number} = {number} + 1000", f"DELETE FROM {table}"):

        def rewrite(connection: Connection, sql: str = sql) -> None:
            connection.execute(sql)

        with pytest.raises(INTEGRITY, match="append-only"):
            await market.coordinator.store.submit(rewrite)


async def test_the_audit_finds_a_changed_balance(market: Market) -> None:
    ann = await market.party("ann", MIN)
    account = wallet((await market.account(ann))["account"], "TEST")

    def tamper(connection: Connection) -> None:
        connection.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", (account,))

    await market.coordinator.store.submit(tamper)
    found = await market.audit()
    assert (found["balanced"], found["mismatches"], found["sum_nanos"]) == (False, 1, 1)


async def test_the_world_outside_owes_what_was_given(market: Market) -> None:
    await market.party("ann", 10 * MIN)
    owed = wallet(TEST_CREDIT, "TEST")
    found = await market.coordinator.store.read(partial(store.balance, account=owed))
    assert found == -10 * MIN
