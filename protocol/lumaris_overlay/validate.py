"""Which documents an honest peer accepts. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Set

from lumaris_overlay.libp2p import addresses
from lumaris_protocol import agreements, codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import (
    ADVERT_LIFETIME_S_MAX,
    DEMAND_LIFETIME_S_MAX,
    DEMANDS_BURST_PER_BUYER,
    DEMANDS_PER_S_PER_BUYER,
)
from lumaris_protocol.messages.advert import Advert, MembershipCertificate
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.revocations import RevokedSet

# Buyers whose rate is remembered; more than can send demands through one peer in a minute.
_BUYERS_MAX = 10_000


class MembershipGate:
    """Checks a membership certificate, whatever its roles, with the coordinators' keys.

    With `revoked`, one of those in it is refused.
    """

    def __init__(
        self,
        network: str,
        coordinator_keys: Set[PeerId],
        revoked: RevokedSet | None = None,
    ) -> None:
        self.network = network
        self.coordinator_keys = coordinator_keys
        self.revoked = revoked if revoked is not None else RevokedSet()

    def check(self, data: bytes, peer: str, now: float) -> Signed[MembershipCertificate]:
        """The certificate of `peer` inside `data`. Raises EnvelopeError."""
        found = agreements.open_certificate(
            data, network=self.network, coordinators=self.coordinator_keys, peer=peer, now=now
        )
        refuse_revoked(self.revoked, found.message)
        return found


def refuse_revoked(revoked: RevokedSet, certificate: MembershipCertificate) -> None:
    """Raise EnvelopeError `revoked` for a certificate that counts no more."""
    if revoked.covers(certificate.peer, serial=certificate.serial, issued_at=certificate.issued_at):
        raise EnvelopeError("revoked")


def refuse_revoked_seller(revoked: RevokedSet, advert: Advert) -> None:
    """Raise EnvelopeError `revoked` for a checked advert whose certificate counts no more."""
    if len(revoked):
        payload = envelope.decode(advert.certificate).payload
        refuse_revoked(revoked, codec.decode_payload(payload, MembershipCertificate))


class AdvertGate:
    """Checks an advert with its bytes, the clock, the coordinators' keys and who is revoked."""

    def __init__(
        self,
        network: str,
        coordinator_keys: Set[PeerId],
        revoked: RevokedSet | None = None,
    ) -> None:
        self.network = network
        self._members = MembershipGate(network, coordinator_keys, revoked)

    def check(self, data: bytes, now: float) -> Signed[Advert]:
        """The advert inside `data`. Raises EnvelopeError with the code of what is wrong."""
        signed = codec.open_signed(data, Advert, network=self.network)
        advert = signed.message
        if signed.signer != advert.seller:
            raise EnvelopeError("wrong_signer", f"An advert of {advert.seller} by {signed.signer}.")
        codec.check_times(
            issued_at=advert.issued_at, expires_at=advert.expires_at, now=now, what="advert"
        )
        if advert.expires_at - advert.issued_at > ADVERT_LIFETIME_S_MAX:
            raise EnvelopeError("malformed", "The advert lives longer than adverts may.")
        certificate = self._members.check(advert.certificate, advert.seller, now).message
        if "seller" not in certificate.roles:
            raise EnvelopeError("not_certified", "The certificate does not let this peer sell.")
        return signed


class DemandGate:
    """Checks a buyer's demand; it is gossiped, so what is wrong with it goes no further."""

    def __init__(
        self,
        network: str,
        coordinator_keys: Set[PeerId],
        revoked: RevokedSet | None = None,
    ) -> None:
        self.network = network
        self._members = MembershipGate(network, coordinator_keys, revoked)
        self._buckets = TokenBuckets(
            per_s=DEMANDS_PER_S_PER_BUYER, burst=DEMANDS_BURST_PER_BUYER, names_max=_BUYERS_MAX
        )

    def check(self, data: bytes, now: float) -> Signed[Demand]:
        """The demand inside `data`. Raises EnvelopeError with the code of what is wrong."""
        signed = codec.open_signed(data, Demand, network=self.network)
        demand = signed.message
        if signed.signer != demand.buyer:
            raise EnvelopeError("wrong_signer", f"A demand of {demand.buyer} by {signed.signer}.")
        codec.check_times(
            issued_at=demand.issued_at, expires_at=demand.expires_at, now=now, what="demand"
        )
        if demand.expires_at - demand.issued_at > DEMAND_LIFETIME_S_MAX:
            raise EnvelopeError("malformed", "The demand lives longer than demands may.")
        if demand.requirements.excluded:
            raise EnvelopeError("malformed", "A demand names no sellers.")
        # Sellers dial these: nobody may point them at somebody else.
        if not all(address.endswith(f"/p2p/{demand.buyer}") for address in demand.addresses):
            raise EnvelopeError("malformed", "The demand names an address of another peer.")
        if not addresses.on_one_ip(demand.addresses):
            raise EnvelopeError("malformed", "The demand names more places than one.")
        certificate = self._members.check(demand.certificate, demand.buyer, now).message
        if "buyer" not in certificate.roles:
            raise EnvelopeError("not_certified", "The certificate does not let this peer buy.")
        return signed

    def admit(self, buyer: str, now: float) -> bool:
        """Whether a buyer may have another demand passed on. `now` is as for `TokenBuckets`."""
        return self._buckets.take(buyer, now)


class TokenBuckets:
    """One token bucket per name; names that were idle long enough to be full are forgotten."""

    def __init__(self, *, per_s: float, burst: int, names_max: int) -> None:
        self._per_s, self._burst, self._names_max = per_s, burst, names_max
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str, now: float, count: int = 1) -> bool:
        """Whether `name` still had `count` tokens. `now` is any clock that does not go back."""
        level, then = self._levels.pop(name, (float(self._burst), now))
        level = min(self._burst, level + (now - then) * self._per_s)
        if len(self._levels) >= self._names_max:
            # The least recently used name is first: insertion order is order of use.
            del self._levels[next(iter(self._levels))]
        self._levels[name] = (level - count if level >= count else level, now)
        return level >= count
