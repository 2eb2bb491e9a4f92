"""The cross-tenant matrix: every route, every other tenant's names, every role.

What is not one's own is not there: the answer is 401, 403 or 404, is the same for a thing of
somebody else as for one that does not exist, is made with the same work, and holds nothing of the
owner's. The table of routes is held to the OpenAPI document, so a new route without a row fails.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio

from lumaris_coordinator import Coordinator, Settings, create_app
from lumaris_coordinator.http import OCTETS
from lumaris_protocol import codec
from lumaris_protocol.messages.budget import CreditRequest
from lumaris_protocol.messages.identity import TlsRequest
from tests.coordinator.builders import NETWORK, Deal, Party, bond_request, registration
from tests.coordinator.conftest import open_market
from tests.coordinator.faults.tenants import (
    CAP,
    HOOK_KEY,
    PAYOUT,
    URL,
    Town,
    open_town,
    state_of,
)
from tests.coordinator.test_events import connect, until
from tests.coordinator.test_money import payout_request
from tests.coordinator.test_users import peer_link, quick
from tests.dispute_builders import bundle, opening, split, withdrawal

STORES = ("sqlite", "postgres")
pytestmark = pytest.mark.slow
REFUSED: Final = (401, 403, 404)
EVE: Final = Party("eve-peer")
# The roles whose credentials hold; those of the others get 401 before anything is looked at.
KNOWN: Final = (
    "another peer",
    "another user",
    "a read-only key",
    "a write-only key",
    "an operator",
)
# Those of them that may use every route of their kind.
WHOLE: Final = ("another peer", "another user", "an operator")

# By the name of a thing in the path: whose it is decides.
OBJECTS: Final[dict[str, str]] = {
    "GET /v1/escrows/{session}": "session",
    "GET /v1/escrows/{session}/claims": "session",
    "GET /v1/receipts/{receipt}": "receipt",
    "GET /v1/disputes/{dispute}": "dispute",
    "GET /v1/disputes/{dispute}/file": "dispute",
    "GET /v1/payouts/{payout}": "payout",
    "GET /v1/webhooks/{webhook}": "webhook",
    "DELETE /v1/webhooks/{webhook}": "webhook",
    "GET /v1/webhooks/{webhook}/deliveries": "webhook",
    "POST /v1/webhooks/{webhook}/replay": "webhook",
    "POST /v1/api-keys/{key}/rotate": "api key",
    "DELETE /v1/api-keys/{key}": "api key",
    "DELETE /v1/users/me/peers/{peer}": "peer",
}
# Lists of one's own, and what is made for oneself: nothing in them names another tenant's thing.
OWN: Final = (
    "GET /v1/accounts/me",
    "GET /v1/accounts/me/transfers",
    "GET /v1/api-keys",
    "GET /v1/bonds/me",
    "GET /v1/disputes",
    "GET /v1/escrows",
    "GET /v1/events/page",
    "GET /v1/payouts",
    "GET /v1/users/me",
    "GET /v1/webhooks",
    "POST /v1/api-keys",
    "POST /v1/users/me/password",
    "POST /v1/webhooks",
)
ENDING: Final = ("DELETE /v1/sessions/me",)
STREAMS: Final = ("GET /v1/events", "WS /v1/stream")
OPERATORS: Final = (
    "POST /v1/operator/revocations",
    "DELETE /v1/operator/revocations/{peer}",
    "GET /v1/operator/reconciliations",
)
# Told to anybody: none of it is about one tenant.
PUBLIC: Final = (
    "GET /.well-known/lumaris-keys",
    "GET /healthz",
    "GET /log/checkpoint",
    "GET /log/consistency",
    "GET /log/tile/{name}",
    "GET /metrics",
    "GET /readyz",
    "GET /v1/bootstrap",
    "GET /v1/info",
    "GET /v1/ledger/audit",
    "GET /v1/offers",
    "GET /v1/revocations",
    "GET /v1/shards",
)
# Doors that take a tenant's name without proof; what they say of it is below.
DOORS: Final = ("POST /v1/identity/challenge", "POST /v1/sessions", "POST /v1/users")

Bodies = Callable[[Town, dict[str, str], Deal], bytes]


def _sign(message: Any) -> bytes:
    return codec.sign(message, EVE.key, NETWORK).data


def _credit(town: Town, things: dict[str, str], deal: Deal) -> bytes:
    return _sign(
        CreditRequest(
            peer=things["peer"],
            coordinator=town.market.peer,
            amount_nanos=CAP,
            nonce="1" * 32,
            issued_at=town.market.now,
        )
    )


def _tls(town: Town, things: dict[str, str], deal: Deal) -> bytes:
    return _sign(
        TlsRequest(
            peer=things["peer"],
            coordinator=town.market.peer,
            challenge="1" * 32,
            csr=b"",
            issued_at=town.market.now,
        )
    )


# Eve signs what names the owner's things. `deal` is the owner's, or one that has no grant.
SIGNED: Final[dict[str, Bodies]] = {
    "POST /v1/credits": _credit,
    "POST /v1/identity/tls-certificate": _tls,
    "POST /v1/identity/register": lambda town, things, deal: registration(
        EVE, town.market.peer, "1" * 32, now=town.market.now, peer=things["peer"]
    ),
    "POST /v1/bonds": lambda town, things, deal: bond_request(
        EVE, town.market.peer, "lock", CAP, now=town.market.now, peer=things["peer"]
    ),
    "POST /v1/payouts": lambda town, things, deal: payout_request(
        EVE, town.market.peer, CAP, peer=things["peer"], issued_at=town.market.now
    ),
    "POST /v1/users/me/peers": lambda town, things, deal: peer_link(
        town.market, EVE, town.eve, peer=things["peer"]
    ),
    "POST /v1/grants": lambda town, things, deal: deal.grant_request(signer=EVE, buyer=EVE.peer),
    "POST /v1/amendments": lambda town, things, deal: deal.amend_request(
        1,
        cap=CAP + 1,
        signer=EVE,
        buyer=EVE.peer,
        amendment_by_buyer=deal.amendment(EVE, 1, cap=CAP + 1),
    ),
    "POST /v1/settle": lambda town, things, deal: deal.claim(EVE, town.court.grant, 5),
    "POST /v1/disputes": lambda town, things, deal: opening(
        town.court.contract, town.court.grant, EVE.key, "not_delivered", network=NETWORK
    ),
    "POST /v1/disputes/{dispute}/evidence": lambda town, things, deal: bundle(
        town.court.contract, things["dispute"], EVE.key, network=NETWORK
    ),
    "POST /v1/disputes/{dispute}/withdraw": lambda town, things, deal: withdrawal(
        town.court.contract, things["dispute"], EVE.key, network=NETWORK
    ),
    "POST /v1/disputes/{dispute}/split": lambda town, things, deal: split(
        town.court.contract, things["dispute"], EVE.key, award=1, refund=1, network=NETWORK
    ),
    "POST /log/add-cosignature": lambda town, things, deal: (
        f"{town.market.coordinator.log.origin}\n1\nAAAA\n\n— {things['peer']} AAAA\n".encode()
    ),
}


@pytest.fixture
async def town(tmp_path: Path, database: str) -> AsyncIterator[Town]:
    state = tmp_path / "state"
    async with open_market(state, database=database, webhooks_to_loopback=True) as market:
        yield await open_town(quick(market))


@pytest.fixture
async def town_in_a_file(tmp_path: Path) -> AsyncIterator[Town]:
    async with open_market(tmp_path / "state", webhooks_to_loopback=True) as market:
        yield await open_town(quick(market))


async def ask(
    town: Town, route: str, name: str, headers: dict[str, str], **more: Any
) -> httpx.Response:
    method, path = route.split()
    path = re.sub(r"\{[^}]*\}", name, path)
    headers = {"idempotency-key": "eve's own", **headers}
    return await town.market.client.request(method, path, headers=headers, **more)


def without_id(answer: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """An answer without what differs between any two: its id, its trace, what the rate leaves."""
    body = re.sub(r'"request_id":"[0-9a-f]*"', "", answer.text)
    told = {
        name: value
        for name, value in answer.headers.items()
        if name not in ("x-request-id", "traceparent", "ratelimit")
    }
    return answer.status_code, body, told


def leaks(town: Town, text: str, *, sent: str = "") -> list[str]:
    """What an answer tells of the owner beyond what the asker said itself."""
    return sorted(secret for secret in town.secrets if secret in text and secret not in sent)


@asynccontextmanager
async def unchanged(town: Town, *but: str) -> AsyncIterator[None]:
    """Every row of every table is as before, but those of the tables named."""
    before = await state_of(town.market, *but)
    yield
    after = await state_of(town.market, *but)
    assert [name for name, rows in after.items() if rows != before[name]] == []


def test_every_route_has_a_row(tmp_path: Path) -> None:
    app = create_app(Coordinator(Settings(state=tmp_path / "state")))
    routes = {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    rows = [*OBJECTS, *OWN, *ENDING, *STREAMS, *OPERATORS, *PUBLIC, *DOORS, *SIGNED]
    assert len(rows) == len(set(rows))
    assert set(rows) == routes | {"WS /v1/stream"}  # a socket has no place in that document


async def test_things_of_another_are_not_there(town: Town) -> None:
    """Each route with a name in its path, by each role; with every kind of name by who may use
    it."""
    async with unchanged(town):
        for route, own in OBJECTS.items():
            for role, headers in town.roles.items():
                absent = await ask(town, route, town.absent[own], headers, params={"after": 0})
                for kind in town.things if role in WHOLE else (own,):
                    name = town.things[kind]
                    found = await ask(town, route, name, headers, params={"after": 0})
                    case = (route, role, kind, found.text)
                    assert found.status_code in REFUSED, case
                    assert leaks(town, found.text) == [], case
                    assert kind != own or without_id(found) == without_id(absent), case


async def test_ones_own_lists_hold_nothing_of_another(town: Town) -> None:
    """From any place, with any cursor of the owner's."""
    cursors: tuple[dict[str, Any], ...] = (
        {},
        {"after": 0},
        {"after": int(town.things["event"]) - 1, "limit": 1},
        {"currency": "TEST", "after": 0},
        {"account": town.things["account"], "peer": town.things["peer"], "user": town.user},
    )
    async with unchanged(town, "token"):  # which the last route ends
        for route in (*OWN, *ENDING):
            for role, headers in town.roles.items():
                for params in cursors if route.startswith("GET") and role in KNOWN else ({},):
                    answer = await ask(town, route, "", headers, params=params)
                    case = (route, role, answer.text)
                    assert leaks(town, answer.text) == [], case
                    assert role in KNOWN or answer.status_code == 401, case


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_streams_hold_nothing_of_another(town_in_a_file: Town, kind: str) -> None:
    """From the first event on, and from the owner's place."""
    town = town_in_a_file
    path = "/v1/events" if kind == "http" else "/v1/stream"
    reading = ("another peer", "another user", "a read-only key", "an operator")
    for role, headers in town.roles.items():
        shown = headers or {"authorization": "Bearer"}
        for after in ("0", town.things["event"]):
            query = f"after={after}"
            async with connect(town.market, path, query=query, kind=kind, **shown) as wire:
                allowed = role in reading
                await until(lambda w=wire, a=allowed: w.done or (a and bool(w.sent)))  # type: ignore[misc]
            told = wire.text + "".join(str(message) for message in wire.sent)
            assert leaks(town, told) == [], (role, told)
            assert allowed or not wire.events, role


async def test_operators_routes_are_for_operators(town_in_a_file: Town) -> None:
    town = town_in_a_file
    others = {role: found for role, found in town.roles.items() if role != "an operator"}
    async with unchanged(town):
        for route in OPERATORS:
            for role, headers in others.items():
                answers = []
                for name in (town.things["peer"], town.absent["peer"]):
                    wanted = {"revoked": [{"peer": name, "serial": 0}]}
                    body = {"json": wanted} if route.startswith("POST") else {}
                    answers.append(await ask(town, route, name, headers, **body))
                assert answers[0].status_code in (401, 403), (route, role, answers[0].text)
                assert without_id(answers[0]) == without_id(answers[1]), (route, role)
                assert leaks(town, answers[0].text) == []


async def test_documents_of_another_signed_by_a_stranger(town: Town) -> None:
    """A document that names the owner's things is worth what its signature is."""
    headers = {**town.roles["another user"], "content-type": OCTETS}
    async with unchanged(town):
        for route, build in SIGNED.items():
            bodies, answers = [], []
            for things, deal in ((town.things, town.court.deal), (town.absent, town.other)):
                bodies.append(build(town, things, deal))
                found = await ask(town, route, things["dispute"], headers, content=bodies[-1])
                answers.append(found)
            found, absent = answers
            case = (route, found.text)
            assert 400 <= found.status_code < 500, case
            assert without_id(found) == without_id(absent), (*case, absent.text)
            assert found.json()["money_moved"] is False, case
            assert leaks(town, found.text, sent=bodies[0].decode("utf-8", "replace")) == [], case


async def test_documents_of_the_owner_carried_by_a_stranger(town: Town) -> None:
    """A signed document says itself whose word it is: who has it gets the answer that its signer
    got, and it is applied once. One that needs its signer's user besides is refused."""
    headers = {**town.roles["another user"], "content-type": OCTETS}
    async with unchanged(town):
        for route, body in town.papers.items():
            found = await ask(town, route, "", headers, content=body)
            if route == "POST /v1/users/me/peers":
                assert (found.status_code, found.json()["code"]) == (403, "forbidden")
                assert leaks(town, found.text) == []
            else:
                again = await ask(town, route, "", {"content-type": OCTETS}, content=body)
                assert found.status_code == 200, (route, found.text)
                assert found.content == again.content, route
    court, dispute = town.court, town.things["dispute"]
    body = bundle(court.contract, dispute, court.buyer.key, network=NETWORK)
    told = await ask(town, "POST /v1/disputes/{dispute}/evidence", dispute, headers, content=body)
    assert told.status_code == 200, told.text
    shown = await court.show(dispute)
    assert [piece["by"] for piece in shown["evidence"]] == [court.seller.peer, court.buyer.peer]


async def test_a_payout_is_of_ones_own_wallet(town_in_a_file: Town) -> None:
    """There is no way to name another, and nothing to take from an empty one."""
    town = town_in_a_file
    others = {role: found for role, found in town.roles.items() if role != "another peer"}
    async with unchanged(town):
        for role, headers in others.items():
            found = await ask(town, "POST /v1/payouts", "", headers, json={"amount_nanos": PAYOUT})
            assert found.status_code in (*REFUSED, 402), (role, found.text)
            named = {"amount_nanos": PAYOUT, "account": town.things["account"]}
            found = await ask(town, "POST /v1/payouts", "", headers, json=named)
            assert found.status_code in (*REFUSED, 400), (role, found.text)
            assert leaks(town, found.text, sent=str(named)) == [], role


async def test_what_is_public_is_of_no_tenant(town_in_a_file: Town) -> None:
    town = town_in_a_file
    tiles = ("0/000", "entries/000", "0/000.p/1", "entries/000.p/1")
    for route in PUBLIC:
        params = {"old": 1, "new": 1} if "consistency" in route else {}
        for name in tiles if "{" in route else ("",):
            answer = await ask(town, route, name, {}, params=params)
            assert leaks(town, answer.content.decode("latin-1")) == [], (route, answer.text)


async def test_a_login_tells_no_name_that_exists(town_in_a_file: Town) -> None:
    """Only who wants a name for itself learns that it is taken."""
    town = town_in_a_file
    client = town.market.client
    answers = [
        await client.post("/v1/sessions", json={"name": name, "password": "not the password"})
        for name in ("ann-the-owner", "nobody-has-this")
    ]
    assert answers[0].status_code == 401
    assert without_id(answers[0]) == without_id(answers[1])
    wanted = {"name": "ann-the-owner", "password": "not the password"}
    taken = await client.post("/v1/users", json=wanted)
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    assert leaks(town, taken.text) == []


async def test_a_challenge_tells_no_peer_that_exists(town_in_a_file: Town) -> None:
    town = town_in_a_file
    found = [
        (await town.market.client.post("/v1/identity/challenge", json={"peer": peer})).json()
        for peer in (town.things["peer"], town.absent["peer"])
    ]
    shapes = [{name: len(str(value)) for name, value in one.items()} for one in found]
    assert shapes[0] == shapes[1]


async def test_an_answer_kept_for_another_is_not_given(town_in_a_file: Town) -> None:
    """The owner's Idempotency-Key with the owner's request, sent by others."""
    town = town_in_a_file
    seen: set[str] = set()
    for role, headers in town.roles.items():
        asked = {**headers, "idempotency-key": HOOK_KEY}
        answer = await town.market.client.post("/v1/webhooks", json={"url": URL}, headers=asked)
        assert leaks(town, answer.text, sent=URL) == [], role
        if answer.status_code == 201:
            seen.add(answer.json()["id"])
        elif role == "a write-only key":  # of the user that has just used this key
            assert answer.json()["code"] == "idempotency_mismatch", answer.text
        else:
            assert answer.status_code in REFUSED, (role, answer.text)
    assert town.things["webhook"] not in seen
    assert len(seen) == 3  # the peer's, the user's, the operator's


@contextmanager
def statements(town: Town) -> Iterator[list[str]]:
    """Every statement that the database runs for this test meanwhile, without its values."""
    found: list[str] = []
    task = trio.lowlevel.current_task()

    def note(sql: str) -> None:
        if trio.lowlevel.in_trio_task() and trio.lowlevel.current_task() is not task:
            return  # somebody who was woken by what happened before
        found.append(re.sub(r"x?'[^']*'|\b\d+\b", "?", sql, flags=re.IGNORECASE))

    backend: Any = town.market.coordinator.store.backend
    writer: Any = town.market.coordinator.store.writer
    connections = (backend._reader, writer._connection)
    for connection in connections:
        connection.set_trace_callback(note)
    try:
        yield found
    finally:
        for connection in connections:
            connection.set_trace_callback(None)


async def test_the_work_does_not_tell_what_exists(town_in_a_file: Town) -> None:
    """Time cannot tell a thing of another from none: the same statements answer both."""
    town = town_in_a_file
    headers = town.roles["another user"]
    for route, kind in OBJECTS.items():
        ran = []
        for name in (town.things[kind], town.absent[kind]):
            with statements(town) as found:
                await ask(town, route, name, headers, params={"after": 0})
            ran.append(list(found))
        assert ran[0], route
        assert ran[0] == ran[1], route
    for route in [route for route in SIGNED if "{dispute}" in route]:
        ran = []
        for things in (town.things, town.absent):
            body = SIGNED[route](town, things, town.court.deal)
            with statements(town) as found:
                await ask(town, route, things["dispute"], headers, content=body)
            ran.append(list(found))
        assert ran[0] == ran[1], route
