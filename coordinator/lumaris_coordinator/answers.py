"""The shape of every JSON answer: what the OpenAPI document promises and tests hold the routes to.

Times are whole seconds since 1970, money is whole nanos. A field that is null is said to be.
"""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """No answer has fields that are not listed here."""


class Problem(Answer):
    """An RFC 9457 problem. `code` is stable; `money_moved` says whether anything was booked."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    money_moved: bool
    request_id: str


class Info(Answer):
    """The public terms."""

    network: str
    coordinator: str
    currency: str
    currencies: list[str]
    fee_bps: int
    settle_window_s: int
    bond_release_s: int
    dispute_window_s: int
    dispute_evidence_s: int
    dispute_check_s: int
    test_credit_nanos: int
    log_origin: str
    version: str
    time: int


class Alive(Answer):
    """The process answers."""

    ok: bool


class Ready(Answer):
    """The store takes writes."""

    ready: bool
    queue_depth: int
    last_commit_s: float
    free_bytes: int | None


class Challenge(Answer):
    """A challenge to sign."""

    challenge: str
    expires_at: int


class Registered(Answer):
    """A peer's membership; `certificate` is base64."""

    certificate: str
    account: str
    token: str
    expires_at: int


class TlsCertificate(Answer):
    """A TLS client certificate and the authority it is from, in PEM."""

    certificate: str
    ca: str
    expires_at: int


class Bootstrap(Answer):
    """Where a newcomer's overlay begins."""

    addresses: list[str]


class UserMade(Answer):
    """A new user."""

    user: str
    name: str
    created_at: int


class LoggedIn(Answer):
    """A token for a name and its password."""

    user: str
    token: str
    expires_at: int


class User(Answer):
    """A user and its peers."""

    user: str
    name: str
    operator: bool
    created_at: int
    peers: list[str]


class Peers(Answer):
    """The peers of a user."""

    peers: list[str]


class ApiKey(Answer):
    """An API key without its secret."""

    id: str
    name: str
    scopes: list[str]
    rate_per_s: int
    created_at: int
    expires_at: int
    last_used_at: int | None
    replaced: bool


class ApiKeyMade(ApiKey):
    """A new key; `key` is its text, told once."""

    key: str


class ApiKeys(Answer):
    """The caller's keys."""

    keys: list[ApiKey]


class Seq(Answer):
    """The number of the newest revocation."""

    seq: int


class Wallet(Answer):
    """Money in one currency: free, held in open sessions, and put down in open disputes."""

    currency: str
    free_nanos: int
    held_nanos: int
    sessions_open: int
    disputed_nanos: int


class Account(Answer):
    """The caller's money; in the main currency, and in each."""

    account: str
    peer: str
    currency: str
    free_nanos: int
    held_nanos: int
    sessions_open: int
    disputed_nanos: int
    wallets: list[Wallet]


class Credited(Answer):
    """One credit; the same for whoever carries the request, and however often."""

    account: str
    peer: str
    currency: str
    credited_nanos: int
    transaction: int


class Transfer(Answer):
    """What moved on an account; what it paid is negative."""

    transfer: int
    transaction: int
    kind: str
    ref: str
    at: int
    amount_nanos: int


class Transfers(Answer):
    """A page of transfers; pass `next` as `after`."""

    transfers: list[Transfer]
    next: int | None


class Release(Answer):
    """A part of a bond that was asked back."""

    amount_nanos: int
    due: int


class Bond(Answer):
    """A bond in one currency, what rulings are still owed from it, and the band that certificates
    tell of it."""

    currency: str
    locked_nanos: int
    owed_nanos: int
    band: int
    releases: list[Release]


class BondOf(Bond):
    """A peer's bond in one currency."""

    peer: str


class Bonds(Answer):
    """Bonds of the caller's peers."""

    bonds: list[BondOf]


class BondsOf(Answer):
    """A peer's bonds after a change."""

    peer: str
    account: str
    bonds: list[Bond]


class Audit(Answer):
    """Whether every balance follows from the transfers; `sums_nanos` by currency are all 0."""

    balanced: bool
    accounts: int
    transfers: int
    last_transfer: int
    sum_nanos: int
    sums_nanos: dict[str, int]
    mismatches: int
    escrow_mismatches: int


class History(Answer):
    """A step in the life of an escrow or a dispute."""

    n: int
    fact: str
    state: str
    evidence: str
    at: int


class Escrow(Answer):
    """The money of a session."""

    number: int
    session: str
    agreement_hash: str
    buyer: str
    seller: str
    currency: str
    state: str
    version: int
    cap_nanos: int
    vouchered_nanos: int
    paid_nanos: int
    held_nanos: int
    disputes_open: int
    granted_at: int
    ends_at: int
    settle_by: int
    runway_s: int
    receipt: str | None


class EscrowShown(Escrow):
    """The money of a session and its history."""

    events: list[History]


class EscrowClaim(Answer):
    """A signed claim, in base64; `taken` is false for one that enclosed a forged voucher."""

    by: str
    taken: bool
    document: str
    at: int


class EscrowClaims(Answer):
    """The claims on a session's money that may be evidence; what was paid, what the bonds hold for
    a dispute now, and how many sellers could be drawn to check a result."""

    paid_nanos: int
    buyer_bond_nanos: int
    seller_bond_nanos: int
    checkers: int
    claims: list[EscrowClaim]


class Escrows(Answer):
    """A page of escrows; pass `next` as `after`."""

    escrows: list[Escrow]
    next: int | None


class Waiting(Answer):
    """A settlement that is not final yet."""

    state: str
    settle_by: int
    vouchered_nanos: int


class Consistency(Answer):
    """A proof that a log extends another (RFC 6962)."""

    old: int
    new: int
    hashes: list[str]


class Cosigned(Answer):
    """How many cosignatures of a head were new."""

    size: int
    kept: int


class Dispute(Answer):
    """A dispute in a list."""

    dispute: str
    number: int
    agreement_hash: str
    claim: str
    order: int | None
    opener: str
    buyer: str
    seller: str
    state: str
    currency: str
    amount_nanos: int
    bond_nanos: int
    stake_nanos: int
    owed_nanos: int
    opened_at: int
    evidence_until: int
    check_until: int | None
    ended_at: int | None


class Evidence(Answer):
    """One delivery of evidence, by its hash."""

    n: int
    by: str
    done: bool
    hash: str


class Ruling(Answer):
    """How a dispute ended."""

    fault: str
    rule: str
    award_nanos: int
    refund_nanos: int
    slash_nanos: int
    collected_nanos: int
    victim_nanos: int
    bond_returned: bool


class DisputeShown(Dispute):
    """A dispute with its evidence, checkers, ruling and history."""

    evidence: list[Evidence]
    checkers: list[str]
    ruling: Ruling | None
    events: list[History]


class Disputes(Answer):
    """A page of disputes; pass `next` as `after`."""

    disputes: list[Dispute]
    next: int | None


class Offer(Answer):
    """An advert that fits; `advert` is the seller's signed document in base64."""

    seller: str
    region: str
    tiers: dict[str, str]
    free: Json
    total: Json
    currency: str
    start_nanos: int
    hour_nanos: int
    lease_s_max: int
    expires_at: int
    advert: str


class Offers(Answer):
    """A page of offers, the cheapest first; `as_of` is when the overlay was last heard."""

    offers: list[Offer]
    next: str | None
    seen: int
    as_of: int
    hint: bool


class Payout(Answer):
    """Money on its way out."""

    payout: str
    number: int
    adapter: str
    currency: str
    amount_nanos: int
    state: str
    reference: str
    reason: str
    requested_at: int


class Payouts(Answer):
    """A page of payouts; pass `next` as `after`."""

    payouts: list[Payout]
    next: int | None


class Reconciliation(Answer):
    """A comparison of the ledger with a provider's books."""

    id: int
    adapter: str
    currency: str
    day: int
    provider_nanos: int
    ledger_nanos: int
    pending_nanos: int
    difference_nanos: int
    at: int


class Reconciliations(Answer):
    """A page of comparisons, newest first; pass `next` as `before`."""

    reconciliations: list[Reconciliation]
    next: int | None


class Event(Answer):
    """Something that happened; `ref` names the thing that changed."""

    id: int
    type: str
    at: int
    ref: str
    data: Json


class Events(Answer):
    """A page of events; pass `next` as `after`."""

    events: list[Event]
    next: int | None


class Webhook(Answer):
    """An endpoint; `seen` is the last event that needs no delivery any more."""

    id: str
    url: str
    kinds: list[str]
    state: str
    reason: str
    seen: int
    failures: int
    failing_since: int | None
    created_at: int


class WebhookMade(Webhook):
    """A new endpoint; `secret` is told once."""

    secret: str


class Webhooks(Answer):
    """The caller's endpoints."""

    webhooks: list[Webhook]


class Delivery(Answer):
    """An attempt to deliver an event; `status` is that of the answer, null without one."""

    number: int
    event: int
    attempt: int
    at: int
    outcome: str
    status: int | None
    took_ms: int


class DeliveryList(Answer):
    """The last attempts, newest first."""

    deliveries: list[Delivery]
