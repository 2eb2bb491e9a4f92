"""What the DHT holds of a peer: the newest record it signed. Pure: time is an argument.

The record is the peer's advert while it sells, else its endpoint. Of two records the one issued
later counts, then the higher `seq`, then the greater bytes, so that all holders agree.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from lumaris_overlay.validate import AdvertGate, MembershipGate
from lumaris_protocol import codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import (
    CLOCK_SKEW_S,
    DHT_RECORD_BYTES_MAX,
    ENDPOINT_LIFETIME_S_MAX,
)
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.endpoint import Endpoint
from lumaris_protocol.revocations import RevokedSet


@dataclass(frozen=True)
class PeerRecord:
    """A checked record: the newest word of `peer` about itself, and the bytes it signed."""

    peer: PeerId
    issued_at: int
    seq: int
    expires_at: int
    addresses: tuple[str, ...]
    services: tuple[str, ...]
    shards: tuple[int, ...]
    withdrawn: bool
    data: bytes

    @property
    def order(self) -> tuple[int, int, bytes]:
        """What decides between two records of one peer: the greater is the newer."""
        return self.issued_at, self.seq, self.data

    def alive(self, now: float) -> bool:
        """Whether honest peers still take it."""
        return now <= self.expires_at + CLOCK_SKEW_S


def newest(*records: PeerRecord | None) -> PeerRecord | None:
    """The newest of what there is."""
    return max(
        (record for record in records if record is not None),
        key=lambda record: record.order,
        default=None,
    )


class RecordGate:
    """Checks a record with its bytes, the clock, the coordinators' keys and who is revoked."""

    def __init__(
        self,
        network: str,
        coordinator_keys: Set[PeerId],
        revoked: RevokedSet | None = None,
    ) -> None:
        self.network = network
        self._adverts = AdvertGate(network, coordinator_keys, revoked)
        self._members = MembershipGate(network, coordinator_keys, revoked)

    def check(self, data: bytes, now: float) -> PeerRecord:
        """The record inside `data`. Raises EnvelopeError with the code of what is wrong."""
        found = envelope.decode(data, size_max=DHT_RECORD_BYTES_MAX)
        if found.payload_type == Advert.TYPE:
            return _of_advert(self._adverts.check(data, now))
        return self._endpoint(data, now)

    def _endpoint(self, data: bytes, now: float) -> PeerRecord:
        signed = codec.open_signed(data, Endpoint, network=self.network)
        endpoint = signed.message
        if signed.signer != endpoint.peer:
            raise EnvelopeError(
                "wrong_signer", f"An endpoint of {endpoint.peer} by {signed.signer}."
            )
        codec.check_times(
            issued_at=endpoint.issued_at, expires_at=endpoint.expires_at, now=now, what="endpoint"
        )
        if endpoint.expires_at - endpoint.issued_at > ENDPOINT_LIFETIME_S_MAX:
            raise EnvelopeError("malformed", "The endpoint lives longer than endpoints may.")
        self._members.check(endpoint.certificate, endpoint.peer, now)
        return PeerRecord(
            peer=signed.signer,
            issued_at=endpoint.issued_at,
            seq=endpoint.seq,
            expires_at=endpoint.expires_at,
            addresses=endpoint.addresses,
            services=endpoint.services,
            shards=endpoint.shards,
            withdrawn=False,
            data=signed.data,
        )


def _of_advert(signed: Signed[Advert]) -> PeerRecord:
    advert = signed.message
    return PeerRecord(
        peer=signed.signer,
        issued_at=advert.issued_at,
        seq=advert.seq,
        expires_at=advert.expires_at,
        addresses=advert.addresses,
        services=(),
        shards=(),
        withdrawn=advert.withdrawn,
        data=signed.data,
    )


class EndpointSigner:
    """Signs our own endpoints, each one newer than the last."""

    def __init__(self, key: KeyPair, network: str) -> None:
        self._key, self._network = key, network
        self._seq = 0
        self._issued_at = 0

    def sign(
        self,
        *,
        certificate: bytes,
        addresses: tuple[str, ...],
        now: float,
        after: int = 0,
        services: tuple[str, ...] = (),
        shards: tuple[int, ...] = (),
    ) -> bytes:
        """An endpoint issued now, and later than `after` and than our last one.

        Raises ValueError when its parts exceed the message's bounds.
        """
        self._issued_at = max(int(now), after + 1, self._issued_at + 1)
        self._seq += 1
        endpoint = Endpoint(
            peer=self._key.peer_id,
            seq=self._seq,
            addresses=addresses,
            services=services,  # type: ignore[arg-type]  # checked when it is signed
            shards=shards,
            issued_at=self._issued_at,
            expires_at=self._issued_at + ENDPOINT_LIFETIME_S_MAX,
            certificate=certificate,
        )
        return codec.sign(endpoint, self._key, self._network).data
