"""Documents as buyers and sellers would make them, and a small market to send them in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from lumaris_coordinator import Coordinator
from lumaris_protocol import codec
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.budget import (
    AmendRequest,
    BondRequest,
    CreditRequest,
    GrantRequest,
    Registration,
)
from lumaris_protocol.messages.negotiation import Agreement, PriceTerms
from lumaris_protocol.messages.payment import Amendment, Close, Settle, Voucher
from lumaris_protocol.money import TEST_CURRENCY

NETWORK = "devnet"
START = 1_800_000_000
CAP = 10_000_000
_numbers = count(1)


class Clock:
    """A clock that tests move."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def key_of(name: str) -> KeyPair:
    """The same key for the same name."""
    return KeyPair(hashlib.sha256(name.encode()).digest())


@dataclass(frozen=True)
class Party:
    """A peer with its session key."""

    name: str

    @property
    def key(self) -> KeyPair:
        return key_of(self.name)

    @property
    def session_key(self) -> KeyPair:
        return key_of(self.name + "/session")

    @property
    def peer(self) -> str:
        return self.key.peer_id


def registration(
    party: Party,
    coordinator: str,
    challenge: str,
    *,
    now: int = START,
    roles: tuple[Any, ...] = ("buyer", "seller"),
    addresses: tuple[str, ...] = (),
    **changes: Any,
) -> bytes:
    message = Registration(
        peer=changes.get("peer", party.peer),
        coordinator=coordinator,
        challenge=challenge,
        roles=roles,
        addresses=addresses,
        issued_at=now,
    )
    return codec.sign(message, party.key, changes.get("network", NETWORK)).data


def credit_request(
    party: Party, coordinator: str, amount: int, *, nonce: str | None = None, now: int = START
) -> bytes:
    message = CreditRequest(
        peer=party.peer,
        coordinator=coordinator,
        amount_nanos=amount,
        nonce=nonce or f"{next(_numbers):032x}",
        issued_at=now,
    )
    return codec.sign(message, party.key, NETWORK).data


def bond_request(
    party: Party,
    coordinator: str,
    action: Any,
    amount: int,
    *,
    now: int = START,
    currency: str = TEST_CURRENCY,
    nonce: str | None = None,
    **changes: Any,
) -> bytes:
    message = BondRequest(
        peer=changes.get("peer", party.peer),
        coordinator=coordinator,
        action=action,
        amount_nanos=amount,
        currency=currency,
        nonce=nonce or f"{next(_numbers):032x}",
        issued_at=now,
    )
    return codec.sign(message, party.key, NETWORK).data


@dataclass
class Deal:
    """One session's documents. `changes` overrides fields of its agreement."""

    buyer: Party
    seller: Party
    coordinator: str
    cap: int = CAP
    now: int = START
    fee_bps: int = 500
    network: str = NETWORK
    number: int = field(default_factory=lambda: next(_numbers))
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> str:
        return str(self.agreement.session)

    @property
    def agreement(self) -> Agreement:
        seed = f"{self.buyer.name}/{self.seller.name}/{self.number}".encode()
        fields: dict[str, Any] = {
            "agreement": derive_id("agreement", seed),
            "session": derive_id("session", seed),
            "advert_hash": digest(b"advert"),
            "request_hash": digest(b"request"),
            "quote_hash": digest(seed),
            "buyer": self.buyer.peer,
            "seller": self.seller.peer,
            "buyer_session_key": self.buyer.session_key.peer_id,
            "seller_session_key": self.seller.session_key.peer_id,
            "coordinator": self.coordinator,
            "resources": Resources(cpu_millis=1_000),
            "tier": "wasm",
            "terms": PriceTerms(
                currency=self.changes.get("currency", TEST_CURRENCY),
                start_nanos=10,
                rate_nanos_per_s=1_000,
                cap_nanos=self.cap,
                exposure_nanos=5_000,
                voucher_interval_s=1,
            ),
            "fee_bps": self.fee_bps,
            "verification": "det",
            "issued_at": self.now,
            "start_by": self.now + 10,
            "ends_at": self.now + 3_600,
        }
        fields.update({k: v for k, v in self.changes.items() if k != "currency"})
        return Agreement(**fields)

    def signed_by(self, party: Party) -> bytes:
        return codec.sign(self.agreement, party.key, self.network).data

    @property
    def hash(self) -> str:
        return digest(codec.encode_payload(self.agreement))

    def grant_request(self, *, signer: Party | None = None, **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "buyer": self.buyer.peer,
            "coordinator": self.coordinator,
            "agreement_by_buyer": self.signed_by(self.buyer),
            "agreement_by_seller": self.signed_by(self.seller),
            "issued_at": self.now,
        }
        fields.update(changes)
        signing = (signer or self.buyer).key
        return codec.sign(GrantRequest(**fields), signing, self.network).data

    def amendment(
        self, signer: Party, n: int, *, cap: int, longer_s: int = 0, **changes: Any
    ) -> bytes:
        """One signed copy of an amendment, whose lease is `longer_s` longer than agreed."""
        fields: dict[str, Any] = {
            "agreement_hash": self.hash,
            "session": self.session,
            "n": n,
            "cap_nanos": cap,
            "ends_at": self.agreement.ends_at + longer_s,
            "issued_at": self.now,
        }
        fields.update(changes)
        return codec.sign(Amendment(**fields), signer.key, self.network).data

    def amend_request(
        self,
        n: int,
        *,
        cap: int,
        longer_s: int = 0,
        by_seller: bool = False,
        signer: Party | None = None,
        **changes: Any,
    ) -> bytes:
        """The buyer's request to hold what an amendment adds."""
        fields: dict[str, Any] = {
            "buyer": self.buyer.peer,
            "coordinator": self.coordinator,
            "agreement_hash": self.hash,
            "amendment_by_buyer": self.amendment(self.buyer, n, cap=cap, longer_s=longer_s),
            "amendment_by_seller": (
                self.amendment(self.seller, n, cap=cap, longer_s=longer_s) if by_seller else None
            ),
            "issued_at": self.now,
        }
        fields.update(changes)
        return codec.sign(AmendRequest(**fields), (signer or self.buyer).key, self.network).data

    def voucher(self, total: int, *, seq: int = 0, signer: KeyPair | None = None) -> bytes:
        message = Voucher(session=self.session, seq=seq, prev=self.hash, total_nanos=total)
        return codec.sign(message, signer or self.buyer.session_key, self.network).data

    def closes(self, total: int) -> tuple[bytes, bytes]:
        message = Close(
            session=self.session,
            seq=9,
            prev=self.hash,
            total_nanos=total,
            orders_accepted=1,
            reason="closed",
        )
        return (
            codec.sign(message, self.buyer.session_key, self.network).data,
            codec.sign(message, self.seller.session_key, self.network).data,
        )

    def claim(
        self, party: Party, grant: bytes, total: int, *, closed: bool = False, **changes: Any
    ) -> bytes:
        """A Settle of `total`: with its voucher, and both closes when `closed`."""
        fields: dict[str, Any] = {
            "session": self.session,
            "party": party.peer,
            "coordinator": self.coordinator,
            "total_nanos": total,
            "agreement_by_buyer": self.signed_by(self.buyer),
            "agreement_by_seller": self.signed_by(self.seller),
            "grant": grant,
            "voucher": self.voucher(total) if total else None,
            "closes": self.closes(total) if closed else (),
            "issued_at": self.now,
        }
        signer = changes.pop("signer", party).key
        fields.update(changes)
        return codec.sign(Settle(**fields), signer, self.network).data


@dataclass
class Market:
    """A running coordinator with a client and registered parties."""

    coordinator: Coordinator
    client: httpx.AsyncClient
    clock: Clock
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        return self.coordinator.peer_id

    @property
    def now(self) -> int:
        return int(self.clock.now)

    async def challenge(self, party: Party) -> str:
        answer = await self.client.post("/v1/identity/challenge", json={"peer": party.peer})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["challenge"])

    async def register(self, party: Party, **changes: Any) -> dict[str, Any]:
        challenge = await self.challenge(party)
        body = registration(party, self.peer, challenge, now=self.now, **changes)
        answer = await self.client.post("/v1/identity/register", content=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        self.tokens[party.name] = found["token"]
        return found

    async def fund(self, party: Party, amount: int) -> None:
        body = credit_request(party, self.peer, amount, now=self.now)
        answer = await self.client.post("/v1/credits", content=body)
        assert answer.status_code == 200, answer.text

    async def party(self, name: str, amount: int = 0) -> Party:
        """A registered party with some credit."""
        found = Party(name)
        await self.register(found)
        if amount:
            await self.fund(found, amount)
        return found

    def deal(self, buyer: Party, seller: Party, **changes: Any) -> Deal:
        return Deal(buyer, seller, self.peer, now=self.now, **changes)

    async def grant(self, deal: Deal) -> bytes:
        answer = await self.client.post("/v1/grants", content=deal.grant_request())
        assert answer.status_code == 200, answer.text
        return answer.content

    async def amend(self, body: bytes) -> httpx.Response:
        return await self.client.post("/v1/amendments", content=body)

    async def settle(self, body: bytes) -> httpx.Response:
        return await self.client.post("/v1/settle", content=body)

    def bearer(self, party: Party) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[party.name]}"}

    async def account(self, party: Party) -> dict[str, Any]:
        answer = await self.client.get("/v1/accounts/me", headers=self.bearer(party))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def free(self, party: Party) -> int:
        return int((await self.account(party))["free_nanos"])

    async def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/v1/ledger/audit")).json()
        return found
