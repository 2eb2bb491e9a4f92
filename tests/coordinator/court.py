"""A court: a market with a session to dispute about, and what its parties do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from lumaris_protocol import agreements, dispute_file
from lumaris_protocol.agreements import Contract
from tests.coordinator.builders import NETWORK, Deal, Market, Party, bond_request
from tests.dispute_builders import Work, bundle, opening

FUNDS = 100_000_000
BOND = 20_000_000
OPENER_BOND = 1_000_000
PAID = 100_000
PRICE = 1_010  # of one order of a second under the builders' terms
HOUR = 3_600


@dataclass
class Court:
    """A market with one granted session between a buyer and a bonded seller."""

    market: Market
    buyer: Party
    seller: Party
    deal: Deal
    grant: bytes
    work: Work

    @property
    def contract(self) -> Contract:
        return self.work.contract

    async def claimed(self, total: int = PAID) -> None:
        """The seller takes what was vouchered: the session is settled."""
        answer = await self.market.settle(self.deal.claim(self.seller, self.grant, total))
        assert answer.status_code == 200, answer.text

    async def open(self, party: Party, claim: str, **changes: Any) -> httpx.Response:
        body = changes.pop("body", None) or self.opening(party, claim, **changes)
        return await self.market.client.post("/v1/disputes", content=body)

    def opening(self, party: Party, claim: str, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"amount": PAID, "network": NETWORK} | changes
        return opening(self.contract, self.grant, party.key, claim, **fields)

    async def opened(self, party: Party, claim: str, **changes: Any) -> str:
        answer = await self.open(party, claim, **changes)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["dispute"])

    async def show(self, dispute: str, party: Party | None = None) -> dict[str, Any]:
        headers = self.market.bearer(party or self.buyer)
        answer = await self.market.client.get(f"/v1/disputes/{dispute}", headers=headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def add(
        self, dispute: str, party: Party, *documents: bytes, **more: Any
    ) -> httpx.Response:
        body = bundle(self.contract, dispute, party.key, *documents, network=NETWORK, **more)
        return await self.market.client.post(f"/v1/disputes/{dispute}/evidence", content=body)

    async def passes(self, seconds: int) -> None:
        """Time goes by while the coordinator is up; everybody renews its registration."""
        self.market.clock.now += seconds
        for name in list(self.market.tokens):
            await self.market.register(Party(name))
        await self.market.coordinator.run_chores()

    async def file(self, dispute: str, party: Party | None = None) -> bytes:
        headers = self.market.bearer(party or self.buyer)
        answer = await self.market.client.get(f"/v1/disputes/{dispute}/file", headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.content

    async def replay(self, dispute: str) -> str:
        data = await self.file(dispute)
        report = dispute_file.verify(data, trusted=frozenset({self.market.peer}))
        assert all(check.holds for check in report.checks) or report.verdict != "valid"
        return report.verdict

    async def money(self) -> tuple[int, int, int]:
        """(buyer's wallet, seller's wallet, seller's bond)."""
        bond = await bond_of(self.market, self.seller)
        return await self.market.free(self.buyer), await self.market.free(self.seller), bond

    async def settles(self, dispute: str) -> dict[str, Any]:
        """The ruling, once it is there; nothing is left behind and the file replays it."""
        found = await self.show(dispute)
        assert found["state"] == "settled", found
        assert (await self.market.audit())["balanced"]
        assert await held_by(self.market, dispute) == 0
        assert await self.replay(dispute) == "valid"
        ruling: dict[str, Any] = found["ruling"]
        return ruling


async def balance(market: Market, account: str) -> int:
    rows = await market.coordinator.store.read(
        lambda c: c.execute("SELECT balance FROM account WHERE id = ?", (account,)).fetchall()
    )
    return int(rows[0][0]) if rows else 0


async def bond_of(market: Market, party: Party) -> int:
    return await balance(market, f"bond:{party.peer}:TEST")


async def held_by(market: Market, dispute: str) -> int:
    return await balance(market, f"dispute:{dispute}:TEST")


async def lock_bond(market: Market, party: Party, amount: int) -> None:
    body = bond_request(party, market.peer, "lock", amount, now=market.now)
    answer = await market.client.post("/v1/bonds", content=body)
    assert answer.status_code == 200, answer.text


async def court_of(market: Market, *, bond: int = BOND, **changes: Any) -> Court:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller", FUNDS)
    if bond:
        await lock_bond(market, seller, bond)
    deal = market.deal(buyer, seller, **changes)
    grant = await market.grant(deal)
    contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
    work = Work(contract, buyer.session_key, seller.session_key, NETWORK)
    return Court(market, buyer, seller, deal, grant, work)


def code(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    return str(answer.json()["code"])
