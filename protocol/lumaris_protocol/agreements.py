"""The checks that make two signed documents one agreement, and a grant its cover."""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Literal

from lumaris_protocol import codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, RefusedError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.limits import CERTIFICATE_LIFETIME_S_MAX, SESSION_KEY_LIFETIME_S_MAX
from lumaris_protocol.messages.advert import MembershipCertificate, Tier, Verification
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.negotiation import Agreement, Quote, QuoteRequest
from lumaris_protocol.messages.payment import Amendment


@dataclass(frozen=True)
class Contract:
    """An agreement with both signatures. `hash` names its payload, which both signed."""

    agreement: Agreement
    hash: str
    by_buyer: bytes
    by_seller: bytes


def join(
    by_buyer: bytes, by_seller: bytes, *, network: str, known: Collection[bytes] = ()
) -> Contract:
    """Check both signatures over the same payload. Raises EnvelopeError.

    Both envelopes are verified (those `known` were before), so a contract can be handed to a third
    party as it is.
    """
    first = envelope.decode(by_buyer, size_max=Agreement.SIZE_MAX)
    agreement = codec.open_decoded(first, Agreement, network=network, known=known).message
    second = envelope.decode(by_seller, size_max=Agreement.SIZE_MAX)
    codec.check_envelope(second, Agreement, network=network, known=known)
    if second.payload != first.payload:
        codec.decode_payload(second.payload, Agreement)  # what is no agreement has its own error
        raise EnvelopeError("terms_changed", "The two sides signed different agreements.")
    if first.signer != agreement.buyer or second.signer != agreement.seller:
        raise EnvelopeError("wrong_signer", "The agreement is not signed by its parties.")
    if agreement.buyer == agreement.seller:
        raise EnvelopeError("wrong_signer", "Buyer and seller are the same peer.")
    if not 0 < agreement.ends_at - agreement.issued_at <= SESSION_KEY_LIFETIME_S_MAX:
        raise EnvelopeError("malformed", "The agreement's session keys live too long.")
    return Contract(agreement, digest(first.payload), first.data, second.data)


def coordinator_of(data: bytes) -> str:
    """The coordinator that one signed copy names, before it is verified. Raises EnvelopeError."""
    return codec.decode_payload(envelope.decode(data).payload, Agreement).coordinator


def payload_hash(data: bytes) -> str:
    """The agreement hash of one signed copy, before it is verified."""
    return digest(envelope.decode(data).payload)


def session_id(request: Signed[QuoteRequest], quote: Signed[Quote]) -> str:
    """The session's id follows from its quote, so neither side can pick a used one."""
    return derive_id("session", f"{request.hash}{quote.hash}".encode())


def is_repeatable(tier: Tier, verification: Verification) -> bool:
    """Whether an agreement on this tier may promise that results can be checked by a second run.

    Only there does the same order come to the same result: guests elsewhere read clocks and dice.
    """
    return tier == "wasm" or verification == "evid"


def draft(
    request: Signed[QuoteRequest],
    quote: Signed[Quote],
    *,
    buyer_session_key: str,
    coordinator: str,
    fee_bps: int,
    now: int,
) -> Agreement:
    """The agreement that follows from a request and its quote; the buyer signs it first."""
    asked, offered = request.message, quote.message
    return Agreement(
        agreement=derive_id("agreement", quote.hash.encode()),
        session=session_id(request, quote),
        advert_hash=offered.advert_hash,
        request_hash=request.hash,
        quote_hash=quote.hash,
        buyer=asked.buyer,
        seller=asked.seller,
        buyer_session_key=buyer_session_key,
        seller_session_key=offered.seller_session_key,
        coordinator=coordinator,
        resources=offered.resources,
        tier=asked.requirements.tier,
        egress=asked.requirements.egress,
        terms=offered.terms,
        fee_bps=fee_bps,
        verification=asked.verification,
        issued_at=now,
        start_by=offered.hold_until,
        ends_at=now + offered.lease_s,
    )


def check_against_quote(
    agreement: Agreement, request: Signed[QuoteRequest], quote: Signed[Quote]
) -> None:
    """The seller's check that a signed agreement repeats its quote. Raises RefusedError."""
    expected = draft(
        request,
        quote,
        buyer_session_key=agreement.buyer_session_key,
        coordinator=agreement.coordinator,
        fee_bps=agreement.fee_bps,
        now=agreement.issued_at,
    )
    if agreement != expected:
        raise RefusedError("terms_changed")


def open_grant(
    data: bytes,
    contract: Contract,
    *,
    network: str,
    coordinator: str,
    now: float | None,
    known: Collection[bytes] = (),
) -> Signed[BudgetGrant]:
    """Check that a grant covers a contract. With `now` it must also be current. Those `known` had
    their signature checked before.

    Raises EnvelopeError for bad bytes and RefusedError `grant_invalid` for another's grant.
    """
    grant = codec.open_signed(data, BudgetGrant, network=network, signer=coordinator, known=known)
    message, agreement = grant.message, contract.agreement
    if now is not None:
        codec.check_times(
            issued_at=message.issued_at, expires_at=message.not_after, now=now, what="budget grant"
        )
    covers = (
        message.agreement_hash == contract.hash
        and message.session == agreement.session
        and message.buyer == agreement.buyer
        and message.seller == agreement.seller
        and message.currency == agreement.terms.currency
        and message.cap_nanos >= agreement.terms.cap_nanos
        and message.not_after >= agreement.ends_at
        and message.settle_by >= message.not_after
    )
    if not covers:
        raise RefusedError("grant_invalid")
    return grant


@dataclass(frozen=True)
class Bounds:
    """What an agreement came to after `n` amendments."""

    n: int
    cap_nanos: int
    ends_at: int


def bounds_of(contract: Contract) -> Bounds:
    """What the agreement itself says."""
    agreement = contract.agreement
    return Bounds(0, agreement.terms.cap_nanos, agreement.ends_at)


def amend(
    contract: Contract, before: Bounds, by_buyer: bytes, by_seller: bytes | None, *, network: str
) -> Bounds:
    """Check one amendment against what held before it; what holds after it.

    Raises EnvelopeError, or RefusedError `amendment_refused` when it does not follow, lowers
    something, changes nothing, or lasts longer without the seller or than session keys may.
    """
    agreement = contract.agreement
    signed = codec.open_signed(by_buyer, Amendment, network=network, signer=agreement.buyer)
    message = signed.message
    if message.agreement_hash != contract.hash or message.session != agreement.session:
        raise RefusedError("amendment_refused", "The amendment is another agreement's.")
    if by_seller is not None:
        other = codec.open_signed(by_seller, Amendment, network=network, signer=agreement.seller)
        if other.message != message:
            raise EnvelopeError("terms_changed", "The two sides signed different amendments.")
    after = Bounds(message.n, message.cap_nanos, message.ends_at)
    if after.n <= before.n:
        raise RefusedError("amendment_refused", f"Amendment {before.n} is in force.")
    if after.cap_nanos < before.cap_nanos or after.ends_at < before.ends_at:
        raise RefusedError("amendment_refused", "An amendment only raises.")
    longer = after.ends_at > before.ends_at
    if not longer and after.cap_nanos == before.cap_nanos:
        raise RefusedError("amendment_refused", "The amendment changes nothing.")
    if longer and by_seller is None:
        raise RefusedError("amendment_refused", "The seller must sign a longer lease as well.")
    if longer and after.ends_at - agreement.issued_at > SESSION_KEY_LIFETIME_S_MAX:
        raise RefusedError("amendment_refused", "The agreement's session keys live too long.")
    return after


def open_certificate(
    data: bytes,
    *,
    network: str,
    coordinators: Set[str],
    peer: str,
    role: Literal["buyer", "seller"] | None = None,
    now: float,
) -> Signed[MembershipCertificate]:
    """Check a membership certificate of `peer` in `role`, or in whatever role it has.

    Raises EnvelopeError: `not_certified` when it is another peer's, another role's or not signed by
    one of the `coordinators`; otherwise as `open_signed` and `check_times` do.
    """
    found = codec.open_signed(data, MembershipCertificate, network=network)
    message = found.message
    named = role is None or role in message.roles
    if found.signer not in coordinators or message.peer != peer or not named:
        shown = "valid certificate" if role is None else f"certificate for the role {role}"
        raise EnvelopeError("not_certified", f"{peer} shows no {shown}.")
    if message.expires_at - message.issued_at > CERTIFICATE_LIFETIME_S_MAX:
        raise EnvelopeError("not_certified", "The membership certificate lives too long.")
    codec.check_times(
        issued_at=message.issued_at,
        expires_at=message.expires_at,
        now=now,
        what="membership certificate",
    )
    return found
