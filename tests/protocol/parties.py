"""A small market for the protocol's tests: three fixed keys and the documents between them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from lumaris_protocol import agreements, codec, ids, merkle, notes, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import GIB, KIB, MIB
from lumaris_protocol.messages.advert import (
    Advert,
    MembershipCertificate,
    PriceTable,
    Resources,
    Runtime,
)
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.execution import File, Limits
from lumaris_protocol.messages.negotiation import (
    Agreement,
    PriceTerms,
    Quote,
    QuoteRequest,
    Requirements,
)
from lumaris_protocol.messages.payment import Voucher
from lumaris_protocol.messages.receipt import LogProof, Receipt, ReceiptBundle

NETWORK = "testnet"
NOW = 1_800_000_000
SALT = bytes(range(100, 132))


def key_of(name: str) -> KeyPair:
    """A fixed key by name."""
    return KeyPair(hashlib.sha256(f"lumaris test key {name}".encode()).digest())


def id_of(kind: str, name: str) -> str:
    """A fixed id by name."""
    return ids.derive_id(kind, name.encode())


def digest_of(name: str) -> str:
    """A fixed digest by name."""
    return ids.digest(name.encode())


COORDINATOR = key_of("coordinator")
BUYER, BUYER_SESSION = key_of("buyer"), key_of("buyer session")
SELLER, SELLER_SESSION = key_of("seller"), key_of("seller session")
STRANGER = key_of("stranger")

RESOURCES = Resources(cpu_millis=1000, memory_bytes=GIB, disk_bytes=GIB)
PRICES = PriceTable(
    currency="TEST", start_nanos=100, cpu_core_s_nanos=1000, memory_gib_s_nanos=1000
)
TERMS = PriceTerms(
    currency="TEST",
    start_nanos=100,
    rate_nanos_per_s=2000,
    cap_nanos=1_000_000,
    exposure_nanos=20_800,
    voucher_interval_s=5,
)
LIMITS = Limits(
    wall_s=60,
    memory_bytes=64 * MIB,
    disk_bytes=64 * MIB,
    fuel=0,
    log_bytes=64 * KIB,
    output_files=16,
)


def certificate(key: KeyPair, *roles: Any, **changes: Any) -> Signed[MembershipCertificate]:
    """A membership certificate by the coordinator."""
    fields: dict[str, Any] = {
        "peer": key.peer_id,
        "account": id_of("account", key.peer_id),
        "roles": roles,
        "bond_band": 0,
        "serial": 1,
        "issued_at": NOW - 60,
        "expires_at": NOW + 24 * 3600,
    }
    return codec.sign(MembershipCertificate(**(fields | changes)), COORDINATOR, NETWORK)


def advert(**changes: Any) -> Signed[Advert]:
    """The seller's advert."""
    fields: dict[str, Any] = {
        "seller": SELLER.peer_id,
        "seq": 1,
        "issued_at": NOW,
        "expires_at": NOW + 600,
        "region": "eu-north",
        "total": RESOURCES,
        "free": RESOURCES,
        "runtimes": (Runtime(tier="wasm", version="wasmtime-50", assurance="sandbox"),),
        "benchmarks": {"cpu": 1000},
        "prices": PRICES,
        "lease_s_max": 3600,
        "certificate": certificate(SELLER, "seller").data,
    }
    return codec.sign(Advert(**(fields | changes)), SELLER, NETWORK)


def requirements(**changes: Any) -> Requirements:
    """What the buyer needs: all the seller has."""
    fields: dict[str, Any] = {"resources": RESOURCES, "tier": "wasm", "currency": "TEST"}
    return Requirements(**(fields | changes))


def request(name: str = "1", *, key: KeyPair = BUYER, **changes: Any) -> Signed[QuoteRequest]:
    """The buyer's request."""
    fields: dict[str, Any] = {
        "request": id_of("request", name),
        "buyer": key.peer_id,
        "seller": SELLER.peer_id,
        "certificate": certificate(key, "buyer").data,
        "requirements": requirements(),
        "lease_s": 3600,
        "cap_nanos": TERMS.cap_nanos,
        "verification": "det",
        "nonce": hashlib.sha256(name.encode()).hexdigest()[:32],
        "issued_at": NOW,
        "expires_at": NOW + 30,
    }
    return codec.sign(QuoteRequest(**(fields | changes)), key, NETWORK)


def quote(asked: Signed[QuoteRequest], **changes: Any) -> Signed[Quote]:
    """The seller's quote for a request."""
    fields: dict[str, Any] = {
        "quote": ids.derive_id("quote", asked.data),
        "request_hash": asked.hash,
        "advert_hash": advert().hash,
        "buyer": asked.message.buyer,
        "seller": SELLER.peer_id,
        "seller_session_key": SELLER_SESSION.peer_id,
        "resources": asked.message.requirements.resources,
        "terms": TERMS,
        "lease_s": asked.message.lease_s,
        "issued_at": NOW,
        "hold_until": NOW + 10,
    }
    return codec.sign(Quote(**(fields | changes)), SELLER, NETWORK)


def agreement(asked: Signed[QuoteRequest], offered: Signed[Quote], **changes: Any) -> Agreement:
    """The draft that follows, at a fee of 2.5 %."""
    fields: dict[str, Any] = {
        "buyer_session_key": BUYER_SESSION.peer_id,
        "coordinator": COORDINATOR.peer_id,
        "fee_bps": 250,
        "now": NOW,
    }
    return agreements.draft(asked, offered, **(fields | changes))


def contract(terms: PriceTerms = TERMS, name: str = "1") -> Contract:
    """An agreement with both signatures."""
    asked = request(name)
    text = agreement(asked, quote(asked, terms=terms))
    return sign_contract(text)


def sign_contract(text: Agreement, *, key: KeyPair = BUYER) -> Contract:
    """Both parties sign an agreement."""
    by_buyer = codec.sign(text, key, NETWORK).data
    by_seller = codec.sign(text, SELLER, NETWORK).data
    return agreements.join(by_buyer, by_seller, network=NETWORK)


def grant(covered: Contract, *, key: KeyPair = COORDINATOR, **changes: Any) -> Signed[BudgetGrant]:
    """The coordinator's grant for a contract."""
    text = covered.agreement
    fields: dict[str, Any] = {
        "grant": id_of("grant", covered.hash),
        "agreement_hash": covered.hash,
        "session": text.session,
        "buyer": text.buyer,
        "seller": text.seller,
        "currency": text.terms.currency,
        "cap_nanos": text.terms.cap_nanos,
        "serial": 7,
        "issued_at": NOW,
        "not_after": text.ends_at,
        "settle_by": text.ends_at + 30 * 24 * 3600,
    }
    return codec.sign(BudgetGrant(**(fields | changes)), key, NETWORK)


def voucher(covered: Contract, total_nanos: int, **changes: Any) -> Signed[Voucher]:
    """A voucher of the buyer's session key, out of any chain."""
    fields: dict[str, Any] = {
        "session": covered.agreement.session,
        "seq": 1,
        "prev": covered.hash,
        "total_nanos": total_nanos,
    }
    return codec.sign(Voucher(**(fields | changes)), BUYER_SESSION, NETWORK)


def file(path: str, data: bytes = b"") -> File:
    """A file entry for some bytes."""
    return File(path=path, size_bytes=len(data), sha256=ids.digest(data))


@dataclass(frozen=True)
class Settled:
    """A receipt in its bundle, with what it was made from."""

    contract: Contract
    receipt: Signed[Receipt]
    bundle: ReceiptBundle


def settled(paid_nanos: int = 123_457, *, leaves: int = 5, index: int = 3) -> Settled:
    """A session that was settled for an amount; 0 means without a voucher."""
    agreed = contract()
    paid_by = voucher(agreed, paid_nanos) if paid_nanos else None
    text = settlement.make_receipt(
        agreed,
        cap_nanos=agreed.agreement.terms.cap_nanos,
        paid_nanos=paid_nanos,
        voucher_hash=paid_by.hash if paid_by else None,
        outcome="claimed",
        now=NOW + 100,
    )
    receipt = codec.sign(text, COORDINATOR, NETWORK)
    ours = merkle.commitment(SALT, receipt.data)
    bodies = [ours if n == index else f"leaf {n}".encode() for n in range(leaves)]
    tree = merkle.Tree(merkle.leaf_hash(body) for body in bodies)
    checkpoint = merkle.Checkpoint(notes.log_origin(NETWORK), leaves, tree.root())
    bundle = ReceiptBundle(
        format="lumaris-receipt/1",
        network=NETWORK,
        receipt=receipt.data,
        agreement_by_buyer=agreed.by_buyer,
        agreement_by_seller=agreed.by_seller,
        grant=grant(agreed).data,
        voucher=paid_by.data if paid_by else None,
        salt=SALT,
        proof=LogProof(
            index=index,
            size=leaves,
            hashes=tuple(merkle.digest_of_hash(node) for node in tree.inclusion_proof(index)),
        ),
        checkpoint=merkle.sign_checkpoint(checkpoint, COORDINATOR),
    )
    return Settled(agreed, receipt, bundle)
