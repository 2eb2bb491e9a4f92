"""Revoked peers and certificates: what ends, what everybody is told, in what pieces."""

from __future__ import annotations

import httpx
import pytest

from lumaris_coordinator.bounds import PAYOUT_NANOS_MIN
from lumaris_coordinator.identity.commands import create_operator
from lumaris_protocol import codec
from lumaris_protocol.messages.notice import Revocations
from tests.coordinator.builders import (
    CAP,
    NETWORK,
    Market,
    Party,
    bond_request,
    credit_request,
    registration,
)
from tests.coordinator.test_money import payout_request
from tests.coordinator.test_users import PASSWORD, delete, get, link, peer_link, post, sign_up, town

__all__ = ["town"]
STORES = ("sqlite", "postgres")


async def operator_key(market: Market) -> str:
    return str(create_operator(market.coordinator.settings, "root", clock=market.clock)["key"])


async def revoke(market: Market, key: str, *targets: Party, serial: int = 0) -> httpx.Response:
    wanted = [{"peer": target.peer, "serial": serial} for target in targets]
    path = "/v1/operator/revocations"
    return await post(market, path, key, revoked=wanted, reason="abuse")


async def page(market: Market, after: int = 0) -> Revocations:
    answer = await market.client.get("/v1/revocations", params={"after": after})
    assert answer.status_code == 200, answer.text
    found = codec.open_signed(
        answer.content, Revocations, network=NETWORK, signer=market.coordinator.peer_id
    )
    return found.message


async def test_a_revoked_peer_is_out(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann", 20_000_000)
    ben = await town.party("ben")
    heard: list[bytes] = []
    town.coordinator.context.notices.listen(heard.append)
    answer = await revoke(town, key, ann)
    assert (answer.status_code, answer.json()) == (200, {"seq": 1})
    assert (await get(town, "/v1/accounts/me", town.tokens["ann"])).status_code == 401
    body = registration(ann, town.peer, await town.challenge(ann), now=town.now)
    again = await town.client.post("/v1/identity/register", content=body)
    assert (again.status_code, again.json()["code"]) == (403, "revoked")
    for deal in (town.deal(ann, ben), town.deal(ben, ann)):
        refused = await town.client.post("/v1/grants", content=deal.grant_request())
        assert (refused.status_code, refused.json()["code"]) == (403, "revoked")
    (told,) = heard
    message = codec.open_signed(told, Revocations, network=NETWORK).message
    assert message == await page(town)
    assert (message.after, message.seq) == (0, 1)
    assert [(each.peer, each.serial, each.reason) for each in message.revoked] == [
        (ann.peer, 0, "abuse")
    ]


async def test_what_a_revoked_peer_holds_can_be_settled(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann", 20_000_000)
    ben = await town.party("ben")
    deal = town.deal(ann, ben)
    grant = await town.grant(deal)
    await revoke(town, key, ann, ben)
    settled = await town.settle(deal.claim(ben, grant, 1_000))
    assert settled.status_code == 200, settled.text
    assert (await town.audit())["balanced"]


async def test_one_certificate_can_be_revoked(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann")
    assert (await revoke(town, key, ann, serial=1)).json() == {"seq": 1}
    assert (await get(town, "/v1/accounts/me", town.tokens["ann"])).status_code == 401
    await town.register(ann)
    assert (await get(town, "/v1/accounts/me", town.tokens["ann"])).status_code == 200
    assert [each.serial for each in (await page(town)).revoked] == [1]


async def test_a_peer_can_be_let_in_again(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann")
    await revoke(town, key, ann)
    path = f"/v1/operator/revocations/{ann.peer}"
    assert (await delete(town, path, key)).status_code == 204
    assert (await delete(town, path, key)).status_code == 404
    await town.register(ann)
    assert len((await page(town)).revoked) == 1


async def test_revoking_twice_is_once(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann")
    for header in ("one", "two"):
        answer = await town.client.post(
            "/v1/operator/revocations",
            json={"revoked": [{"peer": ann.peer}, {"peer": ann.peer}]},
            headers={"authorization": f"Bearer {key}", "idempotency-key": header},
        )
        assert answer.json() == {"seq": 1}


async def test_an_unknown_peer_is_refused_and_nothing_is_revoked(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann")
    refused = await revoke(town, key, ann, Party("nobody"))
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert (await page(town)).revoked == ()
    assert (await get(town, "/v1/accounts/me", town.tokens["ann"])).status_code == 200


@pytest.mark.slow
async def test_pages_are_whole_and_bounded(town: Market) -> None:
    held = town.coordinator.revocations
    peers = [await town.party("one"), await town.party("two")]

    for serial in range(1, 51):
        await town.coordinator.store.submit(
            lambda connection, serial=serial: held.revoke(  # type: ignore[misc]
                connection, [(peer.peer, serial) for peer in peers], reason="x" * 64
            )
        )
    first, second, end = await page(town), await page(town, 64), await page(town, 100)
    assert [(found.after, found.seq, len(found.revoked)) for found in (first, second, end)] == [
        (0, 64, 64),
        (64, 100, 36),
        (100, 100, 0),
    ]
    newest = codec.open_signed(await held.newest(), Revocations, network=NETWORK).message
    assert (newest.after, newest.seq) == (36, 100)


async def test_a_listener_that_fails_harms_nobody(
    town: Market, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_notice: bytes) -> None:
        raise OSError("the overlay is gone")

    key, ann = await operator_key(town), await town.party("ann")
    town.coordinator.context.notices.listen(fail)
    assert (await revoke(town, key, ann)).status_code == 200
    assert "could not be passed on" in caplog.text


async def test_its_owner_hears_of_it(town: Market) -> None:
    key, ann = await operator_key(town), await town.party("ann")
    user, token = await sign_up(town, "owner")
    await link(town, token, peer_link(town, ann, user))
    await revoke(town, key, ann)
    events = (await get(town, "/v1/events/page", token)).json()["events"]
    assert [event["type"] for event in events] == ["peer.revoked"]


async def test_users_and_keys_on_either_store(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    made = (await post(town, "/v1/api-keys", token, name="ci", scopes=["read", "write"])).json()
    fresh = (await post(town, f"/v1/api-keys/{made['id']}/rotate", token)).json()
    listed = (await get(town, "/v1/api-keys", fresh["key"])).json()["keys"]
    assert [(key["id"], key["replaced"]) for key in listed] == [
        (made["id"], True),
        (fresh["id"], False),
    ]
    changed = await post(town, "/v1/users/me/password", token, old=PASSWORD, new="a new password")
    assert changed.status_code == 204
    assert (await delete(town, f"/v1/api-keys/{made['id']}", token)).status_code == 204
    assert (await delete(town, "/v1/sessions/me", token)).status_code == 204
    assert (await get(town, "/v1/users/me", token)).status_code == 401
    assert (await get(town, "/v1/users/me", fresh["key"])).status_code == 200


async def test_a_revoked_peer_begins_nothing_with_its_key(town: Market) -> None:
    key, ann, ben = (
        await operator_key(town),
        await town.party("ann", CAP * 3),
        await town.party("b"),
    )
    deal = town.deal(ann, ben)
    await town.grant(deal)
    (user, token) = await sign_up(town, "owner")
    assert (await revoke(town, key, ann)).status_code == 200
    amount, peer = PAYOUT_NANOS_MIN, town.peer
    begun = {
        "/v1/payouts": payout_request(ann, peer, amount),
        "/v1/bonds": bond_request(ann, peer, "lock", amount),
        "/v1/credits": credit_request(ann, peer, amount),
        "/v1/amendments": deal.amend_request(1, cap=CAP + 1),
    }
    headers = {"content-type": "application/octet-stream"}
    for path, body in begun.items():
        answer = await town.client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "revoked"), path
    linked = await link(town, token, peer_link(town, ann, user))
    assert (linked.status_code, linked.json()["code"]) == (403, "revoked")


async def test_an_operator_takes_out_what_a_revoked_peer_left(town: Market) -> None:
    key, ann, ben = (
        await operator_key(town),
        await town.party("ann", CAP),
        await town.party("ben", CAP),
    )
    wanted = {"amount_nanos": PAYOUT_NANOS_MIN, "peer": ann.peer}
    early = await post(town, "/v1/payouts", key, **wanted)
    assert (early.status_code, early.json()["code"]) == (404, "not_found")
    assert (await revoke(town, key, ann)).status_code == 200
    refused = await post(town, "/v1/payouts", town.tokens["ben"], **wanted)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    taken = await post(town, "/v1/payouts", key, **wanted)
    assert (taken.status_code, taken.json()["state"]) == (200, "held")
    shown = await get(town, f"/v1/payouts/{taken.json()['payout']}", key)
    assert shown.json()["amount_nanos"] == PAYOUT_NANOS_MIN
    assert (await town.audit())["balanced"]
    assert await town.free(ben) == CAP
