"""Money in and out: deposits once, payouts once, whatever ends in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris_coordinator import bounds
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.money import payouts as payouts_module
from lumaris_coordinator.money.adapters.test_credit import TestCredit
from lumaris_coordinator.money.payouts import Payouts
from lumaris_coordinator.money.port import DEPOSIT, PAYOUT
from lumaris_coordinator.store.port import all_rows, first
from lumaris_coordinator.upkeep import commands
from lumaris_coordinator.upkeep.freeze import set_frozen
from lumaris_protocol import codec
from lumaris_protocol.messages.money import PayoutRequest
from tests.coordinator.builders import NETWORK, START, Clock, Market, Party
from tests.coordinator.conformance_adapter import Provider, check_adapter
from tests.coordinator.conftest import open_market

STORES = ("sqlite", "postgres")
MIN = bounds.PAYOUT_NANOS_MIN
NONCE = "0" * 32


def payout_request(
    party: Party, coordinator: str, amount: int, *, signer: Party | None = None, **changes: Any
) -> bytes:
    fields: dict[str, Any] = {
        "peer": party.peer,
        "coordinator": coordinator,
        "adapter": "test-credit",
        "amount_nanos": amount,
        "currency": "TEST",
        "nonce": NONCE,
        "issued_at": START,
    }
    fields.update(changes)
    return codec.sign(PayoutRequest(**fields), (signer or party).key, NETWORK).data


async def ask(market: Market, body: bytes) -> dict[str, Any]:
    headers = {"content-type": "application/octet-stream"}
    answer = await market.client.post("/v1/payouts", content=body, headers=headers)
    found: dict[str, Any] = answer.json()
    assert answer.status_code == 200 or "code" in found
    return found


async def show(market: Market, party: Party, payout: str) -> dict[str, Any]:
    answer = await market.client.get(f"/v1/payouts/{payout}", headers=market.bearer(party))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def account_of(market: Market, party: Party) -> str:
    return wallet((await market.account(party))["account"], "TEST")


async def outside(market: Market, adapter: str) -> int:
    return await market.coordinator.store.read(
        lambda connection: balance(connection, wallet(f"external:{adapter}", "TEST"))
    )


def with_provider(market: Market, provider: Provider) -> None:
    market.coordinator.money.adapters["bank", "TEST"] = provider


async def due(market: Market) -> None:
    """Let every wait for a provider pass, and run a round."""
    market.clock.now += bounds.PAYOUT_RETRY_S_MAX
    await market.coordinator.money.payouts.round()


@pytest.fixture
async def bank(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Market, Provider]]:
    """A market whose payouts move only when a test says so, with a provider outside."""

    async def idle(self: Payouts) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Payouts, "keep", idle)
    async with open_market(tmp_path / "state", database=database) as market:
        provider = Provider()
        with_provider(market, provider)
        yield market, provider


async def test_the_inside_provider_conforms(market: Market) -> None:
    ann = await market.party("ann")

    async def pay_in(amount: int) -> None:
        await market.fund(ann, amount)

    adapter = market.coordinator.money.adapters["test-credit", "TEST"]
    assert isinstance(adapter, TestCredit)
    await check_adapter(adapter, pay_in, account=await account_of(market, ann), least=MIN)


async def test_the_outside_provider_conforms() -> None:
    provider = Provider()

    async def pay_in(amount: int) -> None:
        provider.receive("acc_x:TEST", amount)

    await check_adapter(provider, pay_in, account="acc_x:TEST", least=MIN)


def test_the_tables_end_where_money_rests() -> None:
    for table in (DEPOSIT, PAYOUT):
        reached = {row.next for row in table.rows} | {table.initial}
        assert reached == set(table.states)
        stuck = reached - {row.state for row in table.rows if row.next != row.state}
        assert stuck == table.final


async def test_a_payout_of_test_credit(market: Market) -> None:
    ann = await market.party("ann", 10 * MIN)
    body = payout_request(ann, market.peer, 4 * MIN)
    answers = []

    async def one() -> None:
        answers.append(await ask(market, body))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)
    assert {answer["payout"] for answer in answers} == {answers[0]["payout"]}
    await market.coordinator.money.payouts.round()
    found = await show(market, ann, answers[0]["payout"])
    assert (found["state"], found["amount_nanos"]) == ("paid", 4 * MIN)
    assert await market.free(ann) == 6 * MIN
    assert await outside(market, "test-credit") == -6 * MIN
    assert (await market.audit())["balanced"] is True
    repeated = await ask(market, body)
    assert (repeated["state"], await market.free(ann)) == ("paid", 6 * MIN)


async def test_a_payout_by_token_and_key(market: Market) -> None:
    ann, ben = await market.party("ann", 10 * MIN), await market.party("ben")
    headers = {**market.bearer(ann), "idempotency-key": "one"}
    answers = [
        await market.client.post("/v1/payouts", json={"amount_nanos": 3 * MIN}, headers=headers)
        for _ in range(3)
    ]
    assert {answer.content for answer in answers} == {answers[0].content}
    found = answers[0].json()
    assert (found["state"], found["amount_nanos"]) == ("held", 3 * MIN)
    assert await market.free(ann) == 7 * MIN
    other = await market.client.post("/v1/payouts", json={"amount_nanos": MIN}, headers=headers)
    assert other.json()["code"] == "idempotency_mismatch"
    bare = await market.client.post(
        "/v1/payouts", json={"amount_nanos": MIN}, headers=market.bearer(ann)
    )
    assert bare.json()["code"] == "idempotency_missing"
    second = await market.client.post(
        "/v1/payouts",
        json={"amount_nanos": 3 * MIN},
        headers={**market.bearer(ann), "idempotency-key": "two"},
    )
    assert second.json()["payout"] != found["payout"]
    foreign = await market.client.get(f"/v1/payouts/{found['payout']}", headers=market.bearer(ben))
    assert (foreign.status_code, foreign.json()["code"]) == (404, "not_found")
    pages = [
        (
            await market.client.get(
                f"/v1/payouts?after={after}&limit=1", headers=market.bearer(ann)
            )
        ).json()
        for after in (0, found["number"])
    ]
    assert [page["payouts"][0]["number"] for page in pages] == [1, 2]
    assert [page["next"] for page in pages] == [1, None]
    nothing = await market.client.get("/v1/payouts", headers=market.bearer(ben))
    assert nothing.json() == {"payouts": [], "next": None}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b'{"amount_nanos": -1}',
        b'{"amount_nanos": 1.5}',
        b'{"amount_nanos": "1"}',
        b'{"amount_nanos": 99999999999999999999}',
        b'{"amount_nanos": 1, "currency": "x"}',
        b'{"amount_nanos": 1, "adapter": "../x y"}',
        b'{"amount_nanos": 1, "to": "me"}',
        b"\xff",
        b"[" * 100_000,
    ],
)
async def test_a_body_that_is_no_payout(market: Market, body: bytes) -> None:
    ann = await market.party("ann")
    headers = {
        **market.bearer(ann),
        "idempotency-key": "x",
        "content-type": "application/json; charset=utf-8",
    }
    answer = await market.client.post("/v1/payouts", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_an_account_that_never_had_the_currency(market: Market) -> None:
    ann = await market.party("ann", 10 * MIN)
    market.coordinator.money.adapters["bank", "EUR"] = Provider(currency="EUR")
    found = await ask(market, payout_request(ann, market.peer, MIN, adapter="bank", currency="EUR"))
    assert found["code"] == "no_funds"


@pytest.mark.parametrize(
    ("case", "changes", "code"),
    [
        ("more than there is", {"amount": 11 * MIN}, "no_funds"),
        ("too little", {"amount": MIN - 1}, "usage"),
        ("no such adapter", {"adapter": "gold"}, "usage"),
        ("no such currency", {"currency": "EUR"}, "usage"),
        ("stale", {"issued_at": START - 400}, "expired"),
        ("early", {"issued_at": START + 400}, "not_yet_valid"),
        ("another coordinator", {"coordinator": Party("eve").peer}, "wrong_domain"),
        ("a stranger", {"party": Party("eve")}, "not_certified"),
        ("for another", {"signer": Party("eve")}, "wrong_signer"),
    ],
)
async def test_a_payout_refused(
    market: Market, case: str, changes: dict[str, Any], code: str
) -> None:
    ann = await market.party("ann", 10 * MIN)
    fields = {"party": ann, "coordinator": market.peer, "amount": MIN, **changes}
    found = await ask(market, payout_request(**fields))
    assert found.get("code") == code, case
    assert await market.free(ann) == 10 * MIN


async def test_one_nonce_is_one_payout(market: Market) -> None:
    ann = await market.party("ann", 10 * MIN)
    assert (await ask(market, payout_request(ann, market.peer, MIN)))["state"] == "held"
    found = await ask(market, payout_request(ann, market.peer, 2 * MIN))
    assert found["code"] == "idempotency_mismatch"
    assert await market.free(ann) == 9 * MIN


async def test_open_payouts_are_few(
    bank: tuple[Market, Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    market, _ = bank
    monkeypatch.setattr(payouts_module, "PAYOUTS_OPEN_PER_ACCOUNT_MAX", 2)
    ann = await market.party("ann", 10 * MIN)
    states = []
    for number in range(3):
        body = payout_request(ann, market.peer, MIN, nonce=f"{number:032x}")
        states.append(await ask(market, body))
    assert [state.get("code", state.get("state")) for state in states] == [
        "held",
        "held",
        "too_many",
    ]
    await market.coordinator.money.payouts.round()
    body = payout_request(ann, market.peer, MIN, nonce="f" * 32)
    assert (await ask(market, body))["state"] == "held"


async def test_a_refused_payout_returns(bank: tuple[Market, Provider]) -> None:
    market, provider = bank
    ann = await market.party("ann")
    provider.receive(await account_of(market, ann), 10 * MIN)
    await market.coordinator.money.deposits.round()
    provider.refuses = True
    asked = await ask(market, payout_request(ann, market.peer, 4 * MIN, adapter="bank"))
    assert await market.free(ann) == 6 * MIN
    await market.coordinator.money.payouts.round()
    found = await show(market, ann, asked["payout"])
    assert (found["state"], found["reason"]) == ("returned", "the bank knows no such account")
    assert await market.free(ann) == 10 * MIN
    assert (await market.audit())["balanced"] is True


async def test_a_slow_provider_is_waited_for(bank: tuple[Market, Provider]) -> None:
    market, provider = bank
    ann = await market.party("ann")
    provider.receive(await account_of(market, ann), 10 * MIN)
    await market.coordinator.money.deposits.round()
    provider.slow = True
    asked = await ask(market, payout_request(ann, market.peer, 4 * MIN, adapter="bank"))
    await market.coordinator.money.payouts.round()
    provider.away = True
    await due(market)
    assert (await show(market, ann, asked["payout"]))["state"] == "sent"
    provider.away = False
    provider.finish()
    await due(market)
    found = await show(market, ann, asked["payout"])
    assert (found["state"], found["reference"]) == ("paid", f"out-{asked['payout']}")
    assert provider.calls.count("pay") == 1
    assert await outside(market, "bank") == -provider.total == -6 * MIN


async def test_a_payout_that_waits_is_asked_for_less_often(bank: tuple[Market, Provider]) -> None:
    market, provider = bank
    ann = await market.party("ann", 10 * MIN)
    provider.away = True
    await ask(market, payout_request(ann, market.peer, MIN, adapter="bank"))
    waits: list[int] = []
    for _ in range(12):
        before = len(provider.calls)
        await market.coordinator.money.payouts.round()
        assert len(provider.calls) > before
        again = await market.coordinator.store.read(
            lambda connection: first(connection, "SELECT next_at FROM payout")
        )
        assert again is not None
        waits.append(again[0] - market.now)
        market.clock.now = again[0] - 1
        before = len(provider.calls)
        await market.coordinator.money.payouts.round()
        assert len(provider.calls) == before
        market.clock.now += 1
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[-1] == bounds.PAYOUT_RETRY_S_MAX


@pytest.mark.parametrize("account", ["known", "unknown"])
async def test_deposits_are_credited_once_in_any_order(
    bank: tuple[Market, Provider], account: str
) -> None:
    market, provider = bank
    ann = await market.party("ann")
    to = await account_of(market, ann) if account == "known" else "acc_nobody:TEST"
    provider.receive(to, 5 * MIN, name="a", fact="seen")
    provider.receive(to, 5 * MIN, name="a")
    provider.events.append(provider.events[1])
    provider.receive(to, 3 * MIN, name="b", fact="seen")
    provider.receive(to, 3 * MIN, name="b", fact="reversed")
    provider.receive(to, 5 * MIN, name="a", fact="reversed")
    provider.receive(await account_of(market, ann), 2 * MIN, name="c")
    for _ in range(3):
        await market.coordinator.money.deposits.round()
    assert await market.free(ann) == (7 if account == "known" else 2) * MIN
    rows = await market.coordinator.store.read(
        lambda connection: all_rows(
            connection, "SELECT event, state FROM deposit WHERE adapter = 'bank' ORDER BY event"
        )
    )
    known = [("a", "credited"), ("b", "void"), ("c", "credited")]
    assert rows == (known if account == "known" else known[2:])
    assert (await market.audit())["balanced"] is True


class Killed(BaseException):
    """The program ends here."""


async def crash_after(market: Market, provider: Provider, steps: int) -> bool:
    """Run deposits, a payout and a comparison; end after some steps. Whether it came to the end.

    A step is a durable write, or something the provider has done.
    """
    left = steps
    money, submit = market.coordinator.money, market.coordinator.store.submit
    pay = provider.pay

    def spend() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    async def submit_counted(operation: Any) -> Any:
        spend()
        found = await submit(operation)
        spend()
        return found

    async def pay_counted(order: Any) -> Any:
        spend()
        found = await pay(order)
        spend()
        return found

    ann = Party("ann")
    patch = pytest.MonkeyPatch()
    patch.setattr(market.coordinator.store, "submit", submit_counted)
    patch.setattr(provider, "pay", pay_counted)
    try:
        await money.deposits.round()
        await money.payouts.request(payout_request(ann, market.peer, 4 * MIN, adapter="bank"))
        await money.payouts.round()
        await money.reconciliation.round()
    except Killed:
        return False
    finally:
        patch.undo()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("refuses", [False, True])
async def test_killed_between_any_two_steps_it_pays_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    async def idle(self: Payouts) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Payouts, "keep", idle)
    for steps in range(40):
        state, clock, provider = tmp_path / f"{steps}", Clock(), Provider(refuses=refuses)
        async with open_market(state, clock=clock) as market:
            with_provider(market, provider)
            ann = await market.party("ann")
            provider.receive(await account_of(market, ann), 10 * MIN)
            ended = await crash_after(market, provider, steps)
        async with open_market(state, clock=clock) as market:
            with_provider(market, provider)
            await market.register(ann)
            assert await crash_after(market, provider, 1_000)
            await due(market)
            kept = 10 * MIN if refuses else 6 * MIN
            assert (await market.free(ann), provider.total) == (kept, kept)
            assert list(provider.paid.values()) == ([] if refuses else [4 * MIN])
            assert await outside(market, "bank") == -kept
            assert (await market.audit())["balanced"] is True
            found = await market.coordinator.money.reconciliation.compare(provider)
            assert found is not None
            assert found["difference_nanos"] == 0
        if ended:
            return
    pytest.fail("the steps never ended")


async def test_a_frozen_coordinator_pays_nothing_new(market: Market) -> None:
    ann = await market.party("ann", 10 * MIN)
    await market.coordinator.store.submit(lambda connection: set_frozen(connection, True))
    assert (await ask(market, payout_request(ann, market.peer, MIN)))["code"] == "frozen"
    await market.coordinator.store.submit(lambda connection: set_frozen(connection, False))
    assert (await ask(market, payout_request(ann, market.peer, MIN)))["state"] == "held"


async def test_the_switch_stops_what_is_under_way(bank: tuple[Market, Provider]) -> None:
    """What the provider was told it finishes; it is told nothing more."""
    market, provider = bank
    ann = await market.party("ann")
    provider.receive(await account_of(market, ann), 10 * MIN)
    await market.coordinator.money.deposits.round()
    asked = await ask(market, payout_request(ann, market.peer, 4 * MIN, adapter="bank"))
    commands.freeze(market.coordinator.settings, True)
    await due(market)
    assert "pay" not in provider.calls
    assert (await show(market, ann, asked["payout"]))["state"] == "held"
    commands.freeze(market.coordinator.settings, False)
    await due(market)
    assert (await show(market, ann, asked["payout"]))["state"] == "paid"


async def test_only_an_operator_sees_the_comparisons(market: Market) -> None:
    ann = await market.party("ann")
    url = "/v1/operator/reconciliations"
    answer = await market.client.get(url, headers=market.bearer(ann))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert (await market.client.get(url)).status_code == 401


async def test_events_tell_of_a_payout(market: Market) -> None:
    ann = await market.party("ann", 10 * MIN)
    asked = await ask(market, payout_request(ann, market.peer, MIN))
    await market.coordinator.money.payouts.round()
    rows = await market.coordinator.store.read(
        lambda connection: all_rows(
            connection, "SELECT kind FROM event WHERE ref = ? ORDER BY id", (asked["payout"],)
        )
    )
    assert rows == [("payout.requested",), ("payout.paid",)]
    events = await market.coordinator.store.read(
        lambda connection: first(
            connection, "SELECT count(*) FROM payout_event WHERE payout = ?", (asked["payout"],)
        )
    )
    assert events == (3,)
