"""Rate limits, and the table of who may use which route."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import BaseRoute

from lumaris_coordinator import Settings, create_app
from lumaris_coordinator.bounds import ADDRESS_BURST, DOOR_BURST
from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.limits.access import ACCESS
from lumaris_coordinator.limits.gcra import Buckets
from lumaris_coordinator.limits.limiter import group_of
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market
from tests.coordinator.conftest import open_market
from tests.coordinator.test_users import PASSWORD, get, post, quick, sign_up, town

__all__ = ["town"]


def from_address(market: Market, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(market.coordinator), client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://coordinator")


@pytest.fixture
async def slow_town(tmp_path: Path) -> AsyncIterator[Market]:
    """One request a second for strangers, at most five at once."""
    async with open_market(tmp_path / "state", address_rate=1.0) as found:
        yield quick(found)


# --- the algorithm ---


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    buckets = Buckets("x", rate=2.0, burst=3, size=10)
    first = [buckets.take("a", now=100.0) for _ in range(4)]
    assert [outcome.allowed for outcome in first] == [True, True, True, False]
    assert [outcome.left for outcome in first] == [2, 1, 0, 0]
    assert first[3].retry_after_s == 1
    assert buckets.take("a", now=100.5).allowed
    assert not buckets.take("a", now=100.5).allowed
    assert buckets.take("b", now=100.5).left == 2


def test_a_take_can_be_given_back() -> None:
    buckets = Buckets("x", rate=1.0, burst=1, size=10)
    assert buckets.take("a", now=0.0).allowed
    buckets.give_back("a", now=0.0)
    assert buckets.peek("a", now=0.0).allowed
    buckets.give_back("nobody", now=0.0)
    assert len(buckets) == 0


def test_the_table_is_bounded() -> None:
    buckets = Buckets("x", rate=1.0, burst=1, size=3)
    for name in "abcd":
        buckets.take(name, now=0.0)
    assert len(buckets) == 3
    assert not buckets.peek("d", now=0.0).allowed
    assert buckets.peek("a", now=0.0).allowed  # the one unused for longest was forgotten


@given(
    st.lists(st.floats(min_value=0, max_value=100, allow_nan=False), min_size=1, max_size=60),
    st.integers(1, 10),
    st.integers(1, 10),
)
def test_never_more_than_burst_and_rate_together(times: list[float], rate: int, burst: int) -> None:
    buckets = Buckets("x", rate=rate, burst=burst, size=1)
    taken = [now for now in sorted(times) if buckets.take("a", now=now).allowed]
    for start, begin in enumerate(taken):
        for end in range(start, len(taken)):
            assert end - start + 1 <= burst + rate * (taken[end] - begin) + 1e-6


def test_a_clock_that_goes_back_locks_nobody_out() -> None:
    buckets = Buckets("x", rate=1.0, burst=2, size=1)
    for _ in range(2):
        buckets.take("a", now=1_000.0)
    assert not buckets.take("a", now=0.0).allowed
    assert buckets.take("a", now=0.0).retry_after_s <= 2


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("::ffff:127.0.0.1", None),
        ("127.0.0.1", None),
        ("::1", None),
        ("", "unknown"),
        ("not an address", "unknown"),
    ],
)
def test_what_an_address_is_counted_as(address: str, group: str | None) -> None:
    assert group_of(address) == group


# --- over HTTP ---


async def test_an_address_has_a_bucket(slow_town: Market) -> None:
    async with from_address(slow_town, "198.51.100.7") as client:
        answers = [await client.get("/v1/info") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[0].headers["ratelimit-policy"] == '"address";q=5;w=5'
        assert answers[0].headers["ratelimit"] == '"address";r=4;t=0'
        assert answers[5].headers["ratelimit"] == '"address";r=0;t=1'
        assert answers[5].headers["retry-after"] == "1"
        assert answers[5].json()["code"] == "rate_limited"
        assert (await client.get("/healthz")).status_code == 200
        slow_town.clock.now += 1
        assert (await client.get("/v1/info")).status_code == 200
    async with from_address(slow_town, "198.51.100.8") as client:
        assert (await client.get("/v1/info")).status_code == 200


async def test_neighbours_in_a_64_share_a_bucket(slow_town: Market) -> None:
    for number in range(6):
        async with from_address(slow_town, f"2001:db8::{number + 1}") as client:
            assert (await client.get("/v1/info")).status_code == (429 if number == 5 else 200)


async def test_this_machine_is_not_counted(slow_town: Market) -> None:
    assert {(await slow_town.client.get("/v1/info")).status_code for _ in range(20)} == {200}


async def test_invented_tokens_do_not_escape_the_address(slow_town: Market) -> None:
    async with from_address(slow_town, "198.51.100.7") as client:
        codes = []
        for number in range(6):
            headers = {"authorization": f"Bearer lum_{number:032d}"}
            codes.append((await client.get("/v1/users/me", headers=headers)).status_code)
    assert codes == [401] * 5 + [429]


async def test_credentials_have_their_own_bucket(slow_town: Market) -> None:
    _, token = await sign_up(slow_town, "ann")
    made = await post(slow_town, "/v1/api-keys", token, name="ci", rate_per_s=2)
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    async with from_address(slow_town, "198.51.100.7") as client:
        answers = [await client.get("/v1/users/me", headers=headers) for _ in range(9)]
        assert [answer.status_code for answer in answers] == [200] * 8 + [429]
        assert answers[0].headers["ratelimit-policy"] == '"credential";q=8;w=4'
        # The address paid for none of what the key paid for.
        assert (await client.get("/v1/info")).status_code == 200


async def test_doors_are_smaller(town: Market) -> None:
    assert DOOR_BURST < ADDRESS_BURST
    async with from_address(town, "198.51.100.7") as client:
        for _ in range(DOOR_BURST):
            town.coordinator.limiter.anonymous("198.51.100.7", "/v1/sessions")
        answer = await client.post("/v1/sessions", json={})
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
        assert (await client.get("/v1/info")).status_code == 200


@pytest.mark.parametrize(
    ("proxies", "header", "counted"),
    [
        ((), "203.0.113.1", "198.51.100.7"),
        (("198.51.100.7",), "203.0.113.1", "203.0.113.1"),
        (("198.51.100.7",), "192.0.2.9, 203.0.113.1", "203.0.113.1"),
        (("198.51.100.7", "203.0.113.1"), "192.0.2.9, 203.0.113.1", "192.0.2.9"),
        (("198.51.100.7",), "nonsense", "unknown"),
        (("198.51.100.7",), None, "198.51.100.7"),
    ],
)
async def test_only_a_known_proxy_is_believed(
    tmp_path: Path, proxies: tuple[str, ...], header: str | None, counted: str
) -> None:
    headers = {"x-forwarded-for": header} if header else {}
    async with open_market(tmp_path / "state", address_rate=1.0, proxies=proxies) as market:
        async with from_address(market, "198.51.100.7") as client:
            for _ in range(5):
                await client.get("/v1/info", headers=headers)
        assert not market.coordinator.limiter.anonymous(counted, "/v1/info").allowed


# --- who may use what ---


def routes(found: Iterable[BaseRoute]) -> Iterable[str]:
    """`GET /path` of every route, those of included routers as well."""
    for route in found:
        inner: Any = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner.routes)
            continue
        path = getattr(route, "path", "")
        for method in getattr(route, "methods", None) or ("WS",):
            yield f"{method} {path}"


# The description of the interface itself.
DESCRIPTION = re.compile(r"(GET|HEAD) /(v1/)?(openapi.json|docs.*)|HEAD .*")


async def test_every_route_stands_in_the_table(market: Market) -> None:
    app = create_app(market.coordinator)
    found = {name for name in routes(app.routes) if not DESCRIPTION.fullmatch(name)}
    assert found == set(ACCESS)


def filled(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "nothing", path)


async def test_the_table_is_what_the_routes_do(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    read = (await post(town, "/v1/api-keys", token, name="r", scopes=["read"])).json()["key"]
    write = (await post(town, "/v1/api-keys", token, name="w", scopes=["write"])).json()["key"]
    for route, access in ACCESS.items():
        method, path = route.split()
        if access not in ("read", "write", "operator") or method == "WS":
            continue

        async def ask(key: str, method: str = method, path: str = path) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {key}", "idempotency-key": "x"} if key else {}
            answer = await town.client.request(
                method, filled(path), headers=headers, json={}, params={"after": 0}
            )
            return answer.status_code, answer.json().get("code", "")

        assert await ask("") == (401, "unauthorized"), route
        assert await ask("lum_" + "x" * 32) == (401, "unauthorized"), route
        lacking = write if access == "read" else read
        assert await ask(lacking) == (403, "forbidden"), route
        if access == "operator":
            assert await ask(token) == (403, "forbidden"), route


async def test_a_strangers_things_are_not_there(town: Market) -> None:
    """One user's objects asked for by every other kind of caller."""
    await town.party("peer")
    _, ann = await sign_up(town, "ann")
    _, eve = await sign_up(town, "eve")
    key = (await post(town, "/v1/api-keys", ann, name="ci")).json()["id"]
    operator = create_operator(town.coordinator.settings, "root", clock=town.clock)
    for stranger in (eve, town.tokens["peer"], operator["key"]):
        for method, path in (
            ("DELETE", f"/v1/api-keys/{key}"),
            ("POST", f"/v1/api-keys/{key}/rotate"),
        ):
            headers = {"authorization": f"Bearer {stranger}", "idempotency-key": path}
            answer = await town.client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert (await get(town, "/v1/api-keys", eve)).json() == {"keys": []}


# --- behind a proxy that the settings do not name ---


async def test_what_an_unnamed_local_proxy_forwards_shares_one_rate(
    slow_town: Market, caplog: pytest.LogCaptureFixture
) -> None:
    codes = []
    async with from_address(slow_town, "127.0.0.1") as client:
        for number in range(8):
            answer = await client.get(
                "/v1/info", headers={"x-forwarded-for": f"198.51.100.{number}"}
            )
            codes.append(answer.status_code)
        local = await client.get("/v1/info")
    assert codes == [200] * 5 + [429] * 3
    assert local.status_code == 200  # this machine itself
    assert caplog.text.count("not among the `proxies`") == 1


async def test_failed_logins_behind_it_keep_nobody_else_out(town: Market) -> None:
    await sign_up(town, "ann")
    async with from_address(town, "127.0.0.1") as client:
        for headers in ({"x-forwarded-for": "198.51.100.1"}, {}):
            for number in range(25):
                body = {"name": f"nobody{number}", "password": "x"}
                await client.post("/v1/sessions", json=body, headers=headers)
        headers = {"x-forwarded-for": "203.0.113.5"}
        body = {"name": "ann", "password": PASSWORD}
        assert (await client.post("/v1/sessions", json=body, headers=headers)).status_code == 200


async def test_a_proxy_is_known_in_any_spelling(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"address_rate": 1.0, "proxies": ("::ffff:192.0.2.1",)}
    async with open_market(tmp_path / "state", **settings) as found:
        for spelled in ("192.0.2.1", "::ffff:192.0.2.1"):
            async with from_address(found, spelled) as client:
                codes = []
                for port in range(4):
                    headers = {"x-forwarded-for": f"198.51.100.7:{port}, ::ffff:192.0.2.1"}
                    codes.append((await client.get("/v1/info", headers=headers)).status_code)
            assert codes == ([200] * 4 if spelled == "192.0.2.1" else [200, 429, 429, 429])


@pytest.mark.parametrize("proxy", ["caddy", "10.0.0.0/8", ""])
def test_a_proxy_is_an_address(tmp_path: Path, proxy: str) -> None:
    with pytest.raises(LumarisError, match="proxies"):
        Settings(state=tmp_path, proxies=(proxy,))


async def test_the_keys_of_a_user_share_a_rate(town: Market) -> None:
    _, token = await sign_up(town, "ann")
    keys = []
    for number in range(3):
        made = await post(town, "/v1/api-keys", token, name=f"k{number}", rate_per_s=500)
        keys.append(made.json()["key"])
    identity, limiter = town.coordinator.identity, town.coordinator.limiter
    callers = [await identity.authenticate(f"Bearer {key}") for key in keys]
    taken = [limiter.known(callers[number % 3], "192.0.2.1") for number in range(2_001)]
    assert taken[1_990].allowed
    assert not taken[-1].allowed
    assert taken[-1].policy == "holder"


async def test_a_costly_route_takes_more(tmp_path: Path) -> None:
    async with (
        open_market(tmp_path / "state", address_rate=2.0) as found,
        from_address(found, "192.0.2.1") as client,
    ):
        codes = [(await client.get("/v1/offers")).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert (await client.get("/v1/info")).status_code == 429
    async with (
        open_market(tmp_path / "slow", address_rate=0.2) as found,
        from_address(found, "192.0.2.1") as client,
    ):
        assert (await client.get("/v1/offers")).status_code == 200  # it costs no more than all


async def test_metrics_can_be_kept_from_strangers(tmp_path: Path) -> None:
    async with (
        open_market(tmp_path / "state", metrics_public=False) as found,
        from_address(found, "192.0.2.1") as stranger,
        from_address(found, "127.0.0.1") as local,
    ):
        key = create_operator(found.coordinator.settings, "root", clock=found.clock)["key"]
        forwarded = {"x-forwarded-for": "127.0.0.1"}
        assert (await stranger.get("/metrics")).status_code == 401
        assert (await local.get("/metrics", headers=forwarded)).status_code == 401
        party = await found.party("ann")
        assert (await stranger.get("/metrics", headers=found.bearer(party))).status_code == 403
        operator = {"authorization": f"Bearer {key}"}
        assert (await stranger.get("/metrics", headers=operator)).status_code == 200
        await found.coordinator.run_chores()  # which compare the books
        text = (await local.get("/metrics")).text
    names = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(names) == len(set(names))  # each is told once
    assert any("reconciliation" in name for name in names)
