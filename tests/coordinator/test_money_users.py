"""Users take their money out with API keys; operators read how the books compare."""

from __future__ import annotations

from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.money.reconciliation import DAY_S
from tests.coordinator.builders import Market
from tests.coordinator.conformance_adapter import Provider
from tests.coordinator.test_money import MIN
from tests.coordinator.test_users import get, post, sign_up, town

__all__ = ["town"]


async def pay_in(town: Market, owner: str, amount: int) -> Provider:
    """Somebody pays money into an account at a provider outside."""
    provider = Provider()
    town.coordinator.money.adapters["bank", "TEST"] = provider
    provider.receive(wallet(owner, "TEST"), amount)
    await town.coordinator.money.deposits.round()
    return provider


async def test_a_user_is_paid_out_with_an_api_key(town: Market) -> None:
    user, token = await sign_up(town, "ann")
    provider = await pay_in(town, user, 10 * MIN)
    keys = [
        (await post(town, "/v1/api-keys", token, name=scope, scopes=[scope])).json()["key"]
        for scope in ("read", "write")
    ]
    refused = await post(town, "/v1/payouts", keys[0], amount_nanos=MIN, adapter="bank")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    asked = await post(town, "/v1/payouts", keys[1], amount_nanos=4 * MIN, adapter="bank")
    assert (asked.status_code, asked.json()["state"]) == (200, "held")
    again = await post(town, "/v1/payouts", keys[1], amount_nanos=4 * MIN, adapter="bank")
    assert again.content == asked.content
    await town.coordinator.money.payouts.round()
    name = asked.json()["payout"]
    shown = (await get(town, f"/v1/payouts/{name}", keys[0])).json()
    assert (shown["state"], shown["reference"]) == ("paid", f"out-{name}")
    assert provider.paid == {name: 4 * MIN}
    rest = await town.coordinator.store.read(
        lambda connection: balance(connection, wallet(user, "TEST"))
    )
    assert rest == 6 * MIN


async def test_another_users_payout_is_not_there(town: Market) -> None:
    user, ann = await sign_up(town, "ann")
    _, eve = await sign_up(town, "eve")
    await pay_in(town, user, 10 * MIN)
    asked = await post(town, "/v1/payouts", ann, amount_nanos=MIN, adapter="bank")
    path = f"/v1/payouts/{asked.json()['payout']}"
    assert (await get(town, path, ann)).status_code == 200
    foreign = await get(town, path, eve)
    assert (foreign.status_code, foreign.json()["code"]) == (404, "not_found")
    assert (await get(town, "/v1/payouts", eve)).json()["payouts"] == []
    stolen = await post(town, "/v1/payouts", eve, amount_nanos=MIN, adapter="bank")
    assert stolen.json()["code"] == "no_funds"


async def test_an_operator_reads_the_comparisons_page_by_page(town: Market) -> None:
    operator = create_operator(town.coordinator.settings, "root", clock=town.clock)["key"]
    for _ in range(3):
        await town.coordinator.money.reconciliation.round()
        town.clock.now += DAY_S
    seen, url = [], "/v1/operator/reconciliations?limit=2"
    page = (await get(town, url, operator)).json()
    while True:
        seen += [row["day"] for row in page["reconciliations"]]
        if page["next"] is None:
            break
        page = (await get(town, f"{url}&before={page['next']}", operator)).json()
    assert seen == [town.now // DAY_S - back for back in (1, 2, 3)]
