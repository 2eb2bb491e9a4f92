"""API keys: scopes, ends, rotation, and what a stranger can do with one: nothing."""

from __future__ import annotations

import pytest

from lumaris_coordinator.identity import secrets
from lumaris_coordinator.identity.commands import create_operator
from tests.coordinator.builders import Market
from tests.coordinator.test_users import delete, get, log_in, post, sign_up, town

__all__ = ["town"]
DAY = 24 * 3600


async def test_a_key_is_shown_once_and_keeps_to_its_scopes(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    made = (await post(town, "/v1/api-keys", token, name="ci", scopes=["read"])).json()
    key = made["key"]
    assert key.startswith("lum_devnet_" + made["id"])
    assert (await get(town, "/v1/users/me", key)).status_code == 200
    refused = await post(town, "/v1/api-keys", key, name="more")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    (listed,) = (await get(town, "/v1/api-keys", token)).json()["keys"]
    assert key not in str(listed)
    assert (listed["name"], listed["scopes"], listed["last_used_at"]) == ("ci", ["read"], town.now)
    state = town.coordinator.settings.state
    held = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert key.encode() not in held


async def test_scopes_cannot_be_widened(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    refused = await post(town, "/v1/api-keys", token, name="x", scopes=["operator"])
    assert refused.status_code == 403
    made = (await post(town, "/v1/api-keys", token, name="x", scopes=["write"])).json()
    wider = await post(town, "/v1/api-keys", made["key"], name="y", scopes=["read", "write"])
    assert wider.status_code == 403


async def test_a_rotated_key_is_good_for_a_day_more(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    old = (await post(town, "/v1/api-keys", token, name="ci")).json()
    path = f"/v1/api-keys/{old['id']}/rotate"
    new = await post(town, path, token)
    assert new.status_code == 201, new.text
    assert (await post(town, path, token)).json() == new.json()  # the same Idempotency-Key
    again = await town.client.post(
        path, headers={"authorization": f"Bearer {token}", "idempotency-key": "another"}
    )
    assert (again.status_code, again.json()["code"]) == (400, "usage")
    fresh = new.json()["key"]
    for held in (old["key"], fresh):
        assert (await get(town, "/v1/users/me", held)).status_code == 200
    town.clock.now += DAY
    assert (await get(town, "/v1/users/me", old["key"])).status_code == 401
    assert (await get(town, "/v1/users/me", fresh)).status_code == 200


async def test_a_key_ends(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    made = (await post(town, "/v1/api-keys", token, name="ci", lifetime_s=60)).json()
    town.clock.now += 60
    assert (await get(town, "/v1/users/me", made["key"])).status_code == 401
    await town.coordinator.run_chores()
    assert (await get(town, "/v1/api-keys", token)).json() == {"keys": []}


async def test_a_key_is_deleted_by_its_owner_only(town: Market) -> None:
    _, ann = await sign_up(town, "ann")
    _, eve = await sign_up(town, "eve")
    made = (await post(town, "/v1/api-keys", ann, name="ci")).json()
    path = f"/v1/api-keys/{made['id']}"
    assert (await delete(town, path, eve)).status_code == 404
    assert (await post(town, f"{path}/rotate", eve)).status_code == 404
    assert (await delete(town, path, ann)).status_code == 204
    assert (await get(town, "/v1/users/me", made["key"])).status_code == 401


async def test_a_user_has_so_many_keys(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    for number in range(32):
        made = await post(town, "/v1/api-keys", token, name=f"key{number}")
        assert made.status_code == 201
    full = await post(town, "/v1/api-keys", token, name="one-more")
    assert (full.status_code, full.json()["code"]) == (409, "limit_reached")


async def test_a_mistyped_key_is_not_looked_up(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    key = (await post(town, "/v1/api-keys", token, name="ci")).json()["key"]
    assert secrets.key_id(key) == key.split("_")[-3]
    for wrong in (key[:-1] + ("0" if key[-1] != "0" else "1"), key[:-1], key + "0", key.upper()):
        assert secrets.key_id(wrong) is None
        assert (await get(town, "/v1/users/me", wrong)).status_code == 401
    # A key with a right checksum and the id of another is looked up, and does not hold.
    forged = secrets.make_key("devnet").text
    assert secrets.key_id(forged) is not None
    assert (await get(town, "/v1/users/me", forged)).status_code == 401


async def test_a_peer_needs_no_keys(town: Market) -> None:
    await town.party("buyer")
    refused = await post(town, "/v1/api-keys", town.tokens["buyer"], name="x")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


async def test_an_operator_has_keys_and_no_password(town: Market) -> None:
    operator = create_operator(town.coordinator.settings, "root", clock=town.clock)
    caller = await town.coordinator.identity.authenticate(f"Bearer {operator['key']}")
    assert (caller.kind, "operator" in caller.scopes) == ("operator", True)
    assert not caller.may_see((await town.party("buyer")).peer)
    for password in ("", "a long password"):
        answer = await post(town, "/v1/sessions", name="root", password=password)
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "field", [{"scopes": []}, {"scopes": ["all"]}, {"rate_per_s": 0}, {"x": 1}]
)
async def test_bad_wishes(town: Market, field: dict[str, object]) -> None:
    _, token = await sign_up(town, "ann")
    answer = await post(town, "/v1/api-keys", token, name="x", **field)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_a_key_makes_none_that_outlives_it(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    wish = {"scopes": ["read", "write"], "lifetime_s": 60, "rate_per_s": 5}
    short = (await post(town, "/v1/api-keys", token, name="short", **wish)).json()
    town.clock.now += 10
    wish = {"scopes": ["write"], "lifetime_s": 400 * DAY, "rate_per_s": 500}
    made = (await post(town, "/v1/api-keys", short["key"], name="long", **wish)).json()
    assert (made["expires_at"], made["rate_per_s"]) == (short["expires_at"], 5)
    rotated = (await post(town, f"/v1/api-keys/{short['id']}/rotate", short["key"])).json()
    assert (rotated["expires_at"], rotated["rate_per_s"]) == (short["expires_at"], 5)


async def test_rotations_in_a_row_have_an_end(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    name = (await post(town, "/v1/api-keys", token, name="ci")).json()["id"]
    for _ in range(63):
        name = (await post(town, f"/v1/api-keys/{name}/rotate", token)).json()["id"]
    full = await post(town, f"/v1/api-keys/{name}/rotate", token)
    assert (full.status_code, full.json()["code"]) == (409, "limit_reached")
    town.clock.now += DAY
    token = await log_in(town, "ann")
    assert (await post(town, f"/v1/api-keys/{name}/rotate", token)).status_code == 201


async def test_an_operator_renews_its_key_with_itself(town: Market) -> None:
    made = create_operator(town.coordinator.settings, "root", clock=town.clock)
    town.clock.now += DAY
    new = (await post(town, f"/v1/api-keys/{made['id']}/rotate", made["key"])).json()
    assert new["expires_at"] == made["expires_at"] + DAY
