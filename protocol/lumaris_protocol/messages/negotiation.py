"""From a question to an agreement both sides signed."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Features, Resources, Tier, Verification
from lumaris_protocol.messages.base import (
    Amount,
    Currency,
    Digest,
    Id,
    Message,
    Name,
    Nonce,
    Part,
    Peer,
    Seconds,
    SmallDocument,
    Time,
)

Hold = Annotated[int, Meta(ge=0, le=limits.QUOTE_HOLD_S_MAX)]
# A host and port that a job may connect to: a name, or `*.` and a domain, then the port.
EgressRule = Annotated[
    str,
    Meta(
        max_length=limits.ADDRESS_CHARS_MAX,
        pattern=r"^(\*\.)?([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]*[a-z0-9])?:[0-9]{1,5}\Z",
    ),
]
EgressRules = Annotated[tuple[EgressRule, ...], Meta(max_length=limits.EGRESS_RULES_MAX)]
VoucherInterval = Annotated[
    int, Meta(ge=limits.VOUCHER_INTERVAL_S_MIN, le=limits.VOUCHER_INTERVAL_S_MAX)
]
FeeBps = Annotated[int, Meta(ge=0, le=limits.FEE_BPS_MAX)]


class Requirements(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a buyer needs. Empty lists mean "any"; zero prices mean "no limit".

    `egress` names every host and port that the jobs must reach; without it they reach nothing.
    `features` are what the runtime must offer beside running (see `Runtime`). With `image_fetched`
    the image may come from elsewhere than the seller's cache; who holds it is only preferred.
    """

    resources: Resources
    tier: Tier
    image: Digest | None = None
    image_fetched: bool = False
    assurances: Annotated[tuple[Name, ...], Meta(max_length=limits.RUNTIMES_MAX)] = ()
    regions: Annotated[tuple[Name, ...], Meta(max_length=limits.REGIONS_MAX)] = ()
    currency: Currency
    rate_nanos_max: Amount = 0
    egress: EgressRules = ()
    features: Features = ()
    excluded: Annotated[tuple[Peer, ...], Meta(max_length=limits.EXCLUDED_PEERS_MAX)] = ()


class QuoteRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A buyer asks one seller for a price. It carries no secrets: no command, no data.

    `cap_nanos` is the most the session may cost; 0 leaves it to the price of the whole lease.
    """

    TYPE: ClassVar[str] = "quote_request"
    request: Id
    buyer: Peer
    seller: Peer
    certificate: SmallDocument
    requirements: Requirements
    lease_s: Seconds
    cap_nanos: Amount
    verification: Verification
    nonce: Nonce
    issued_at: Time
    expires_at: Time


class PriceTerms(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The price of a session: `start_nanos` for each order, and a rate while an order runs."""

    currency: Currency
    start_nanos: Amount
    rate_nanos_per_s: Amount
    cap_nanos: Amount
    exposure_nanos: Amount
    voucher_interval_s: VoucherInterval


class Quote(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A seller's binding price; the capacity is held until `hold_until`."""

    TYPE: ClassVar[str] = "quote"
    quote: Id
    request_hash: Digest
    advert_hash: Digest
    buyer: Peer
    seller: Peer
    seller_session_key: Peer
    resources: Resources
    terms: PriceTerms
    lease_s: Seconds
    issued_at: Time
    hold_until: Time


class Agreement(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contract. Both sides sign the very same payload bytes; one signature is no agreement.

    It delegates to a session key on each side until `ends_at`: orders, vouchers and deliveries are
    signed with those.
    """

    TYPE: ClassVar[str] = "agreement"
    SIZE_MAX: ClassVar[int] = limits.AGREEMENT_BYTES_MAX
    agreement: Id
    session: Id
    advert_hash: Digest
    request_hash: Digest
    quote_hash: Digest
    buyer: Peer
    seller: Peer
    buyer_session_key: Peer
    seller_session_key: Peer
    coordinator: Peer
    resources: Resources
    tier: Tier
    egress: EgressRules = ()
    terms: PriceTerms
    fee_bps: FeeBps
    verification: Verification
    issued_at: Time
    start_by: Time
    ends_at: Time
