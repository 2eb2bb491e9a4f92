"""A tenant with one of everything that the coordinator keeps, and everybody who is not it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import anyio
import httpx

from lumaris_coordinator.bounds import API_KEY_RATE_MAX, CERTIFICATE_LIFETIME_S
from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_protocol import agreements
from lumaris_protocol.ids import derive_id, digest
from tests.coordinator.builders import NETWORK, Deal, Market, Party, bond_request, credit_request
from tests.coordinator.court import Court
from tests.coordinator.test_money import payout_request
from tests.coordinator.test_users import get, link, log_in, peer_link, post, sign_up
from tests.dispute_builders import Work

# Amounts that nothing else here has, so that a digit of them in a stranger's answer is a leak.
CREDIT: Final = 98_765_431
BOND: Final = 20_123_457
CAP: Final = 7_654_321
PAID: Final = 1_234_567
PAYOUT: Final = 3_456_789
URL: Final = "http://127.0.0.1:9/tenant-hook"
HOOK_KEY: Final = "the owner's own key"


@dataclass
class Town:
    """Ann owns a buyer and a seller; `things` are hers, by kind. Eve is everybody else."""

    market: Market
    court: Court
    user: str
    eve: str
    things: dict[str, str]
    secrets: frozenset[str]
    # Who asks, by name: the headers of its requests.
    roles: dict[str, dict[str, str]]
    # The owner's signed documents, by the route that took them.
    papers: dict[str, bytes]
    other: Deal

    @property
    def absent(self) -> dict[str, str]:
        """For each kind a name of the same form that stands for nothing."""
        seed = b"nothing here"
        return {
            "peer": Party("absent").peer,
            "user": derive_id("user", seed),
            "session": derive_id("session", seed),
            "agreement": digest(seed),
            "receipt": derive_id("receipt", seed),
            "dispute": derive_id("dispute", seed),
            "webhook": derive_id("webhook", seed),
            "api key": _like(self.things["api key"]),
            "event": str(10**9),
            "payout": _like(self.things["payout"]),
            "account": derive_id("account", seed),
            "bond": f"bond:{Party('absent').peer}:TEST",
        }


def _like(name: str) -> str:
    """Another name of the same length."""
    head, tail = name[:-4], name[-4:]
    return head + "".join("b" if letter == "a" else "a" for letter in tail)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def state_of(market: Market, *but: str) -> dict[str, list[str]]:
    """All rows of all tables but some. Times of use and of life are no state."""
    sql = "\n".join(step for migration in MIGRATIONS for step in migration.statements)
    names = set(re.findall(r"CREATE TABLE (\w+)", sql)) - {"api_key", "downtime", *but}

    def look(connection: Connection) -> dict[str, list[str]]:
        return {
            name: sorted(map(repr, map(tuple, all_rows(connection, f"SELECT * FROM {name}"))))
            for name in sorted(names)
        }

    return await market.coordinator.store.read(look)


async def _sent(market: Market, papers: dict[str, bytes], path: str, body: bytes) -> httpx.Response:
    answer = await market.client.post(path, content=body)
    assert answer.status_code == 200, answer.text
    papers[f"POST {path}"] = body
    return answer


async def _trade(market: Market, papers: dict[str, bytes]) -> tuple[Court, dict[str, str]]:
    """A bonded seller, a settled session, and one with a dispute that goes on."""
    buyer, seller = await market.party("ann-buys"), await market.party("ann-sells", CREDIT)
    body = credit_request(buyer, market.peer, CREDIT, now=market.now)
    await _sent(market, papers, "/v1/credits", body)
    body = bond_request(seller, market.peer, "lock", BOND, now=market.now)
    await _sent(market, papers, "/v1/bonds", body)
    settled = market.deal(buyer, seller, cap=CAP)
    body = settled.claim(seller, await market.grant(settled), PAID)
    await _sent(market, papers, "/v1/settle", body)
    deal = market.deal(buyer, seller, cap=CAP)
    body = deal.grant_request()
    grant = (await _sent(market, papers, "/v1/grants", body)).content
    contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
    work = Work(contract, buyer.session_key, seller.session_key, NETWORK)
    court = Court(market, buyer, seller, deal, grant, work)
    body = court.opening(seller, "unpaid_delivery", amount=PAID)
    dispute = str((await _sent(market, papers, "/v1/disputes", body)).json()["dispute"])
    body = payout_request(buyer, market.peer, PAYOUT, issued_at=market.now)
    payout = await _sent(market, papers, "/v1/payouts", body)
    await paid_out(market, buyer, str(payout.json()["payout"]))
    shown = await market.client.get(f"/v1/escrows/{settled.session}", headers=market.bearer(buyer))
    return court, {
        "session": deal.session,
        "agreement": deal.hash,
        "receipt": str(shown.json()["receipt"]),
        "dispute": dispute,
        "payout": str(payout.json()["payout"]),
        "account": str((await market.account(buyer))["account"]),
        "bond": f"bond:{seller.peer}:TEST",
        "peer": buyer.peer,
    }


async def paid_out(market: Market, party: Party, payout: str) -> None:
    """Wait for the provider, so that nothing goes on by itself any more."""
    path, headers = f"/v1/payouts/{payout}", market.bearer(party)
    with anyio.fail_after(5):
        while (await market.client.get(path, headers=headers)).json()["state"] != "paid":
            await market.coordinator.money.payouts.round()


async def _hook(market: Market, token: str) -> dict[str, Any]:
    headers = {**bearer(token), "idempotency-key": HOOK_KEY}
    made = await market.client.post("/v1/webhooks", json={"url": URL}, headers=headers)
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


async def open_town(market: Market) -> Town:
    """Everything made, and a day gone by: what Ann was given first has ended."""
    user, old_token = await sign_up(market, "ann-the-owner")
    old_peer = await market.party("ann-left")
    operator = create_operator(market.coordinator.settings, "root", clock=market.clock)["key"]
    short = await post(market, "/v1/api-keys", old_token, name="short", lifetime_s=60)
    expired_peer = market.tokens[old_peer.name]
    market.clock.now += CERTIFICATE_LIFETIME_S + 1

    papers: dict[str, bytes] = {}
    court, things = await _trade(market, papers)
    token = await log_in(market, "ann-the-owner")
    for party in (court.buyer, court.seller):
        papers["POST /v1/users/me/peers"] = peer_link(market, party, user)
        assert (await link(market, token, papers["POST /v1/users/me/peers"])).status_code == 200
    key = (await post(market, "/v1/api-keys", token, name="ann-ci", scopes=["read"])).json()
    hook = await _hook(market, token)
    events = (await get(market, "/v1/events/page", token)).json()["events"]
    things |= {
        "user": user,
        "api key": str(key["id"]),
        "webhook": str(hook["id"]),
        "event": str(events[-2]["id"]),
    }
    roles, eve = await _strangers(market)
    roles |= {
        "the owner's expired login": bearer(old_token),
        "the owner's expired key": bearer(short.json()["key"]),
        "a peer whose token expired": bearer(expired_peer),
        "an operator": bearer(operator),
        "a revoked peer": await _revoked(market, operator),
    }
    numbers = {str(number) for number in (BOND, CAP, PAID, PAYOUT)}
    secrets = numbers | {value for kind, value in things.items() if kind != "event"}
    secrets |= {court.seller.peer, "ann-the-owner", URL, str(hook["secret"]), str(key["key"])}
    other = market.deal(court.buyer, court.seller, cap=CAP)
    return Town(market, court, user, eve, things, frozenset(secrets), roles, papers, other)


async def _strangers(market: Market) -> tuple[dict[str, dict[str, str]], str]:
    eve, token = await sign_up(market, "eve")
    _, gone = await sign_up(market, "gone")
    assert (await market.client.delete("/v1/sessions/me", headers=bearer(gone))).is_success
    party = await market.party("eve-peer", CREDIT + 7)
    assert (await link(market, token, peer_link(market, party, eve))).status_code == 200
    keys: dict[str, Any] = {}
    for scope in ("read", "write"):
        # Here it is not the rate that refuses.
        wanted = {"name": scope, "scopes": [scope], "rate_per_s": API_KEY_RATE_MAX}
        keys[scope] = (await post(market, "/v1/api-keys", token, **wanted)).json()
    return {
        "nobody": {},
        "an invented token": bearer("lum_" + "x" * 43),
        "an ended login": bearer(gone),
        "another peer": market.bearer(party),
        "another user": bearer(token),
        "a read-only key": bearer(keys["read"]["key"]),
        "a write-only key": bearer(keys["write"]["key"]),
    }, eve


async def _revoked(market: Market, operator: str) -> dict[str, str]:
    party = await market.party("revoked-peer")
    wanted = [{"peer": party.peer, "serial": 0}]
    answer = await post(market, "/v1/operator/revocations", operator, revoked=wanted)
    assert answer.status_code == 200, answer.text
    return market.bearer(party)
