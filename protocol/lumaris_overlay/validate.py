"""Which adverts an honest peer accepts. Pure: time is an argument."""

from __future__ import annotations

from lumaris_protocol import codec
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import ADVERT_LIFETIME_S_MAX, CERTIFICATE_LIFETIME_S_MAX
from lumaris_protocol.messages.advert import Advert, MembershipCertificate


class AdvertGate:
    """Checks an advert with nothing but its bytes, the clock and the coordinators' keys."""

    def __init__(self, network: str, coordinator_keys: frozenset[PeerId]) -> None:
        self.network = network
        self.coordinator_keys = coordinator_keys

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
        self._check_certificate(advert, now)
        return signed

    def _check_certificate(self, advert: Advert, now: float) -> None:
        signed = codec.open_signed(advert.certificate, MembershipCertificate, network=self.network)
        certificate = signed.message
        if signed.signer not in self.coordinator_keys:
            raise EnvelopeError("not_certified", "The certificate is from an unknown coordinator.")
        if certificate.peer != advert.seller or "seller" not in certificate.roles:
            raise EnvelopeError("not_certified", "The certificate does not let this peer sell.")
        if certificate.expires_at - certificate.issued_at > CERTIFICATE_LIFETIME_S_MAX:
            raise EnvelopeError("not_certified", "The certificate lives longer than it may.")
        codec.check_times(
            issued_at=certificate.issued_at,
            expires_at=certificate.expires_at,
            now=now,
            what="certificate",
        )


class TokenBuckets:
    """One token bucket per name; names that were idle long enough to be full are forgotten."""

    def __init__(self, *, per_s: float, burst: int, names_max: int) -> None:
        self._per_s, self._burst, self._names_max = per_s, burst, names_max
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str, now: float) -> bool:
        """Whether `name` still had a token. `now` is any clock that does not go back."""
        level, then = self._levels.pop(name, (float(self._burst), now))
        level = min(self._burst, level + (now - then) * self._per_s)
        if len(self._levels) >= self._names_max:
            # The least recently used name is first: insertion order is order of use.
            del self._levels[next(iter(self._levels))]
        self._levels[name] = (level - 1 if level >= 1 else level, now)
        return level >= 1
