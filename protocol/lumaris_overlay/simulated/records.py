"""The records a simulated host holds: what the DHT is on the real network."""

from __future__ import annotations

from collections.abc import Iterable, Set

from lumaris_overlay import records
from lumaris_overlay.records import EndpointSigner, PeerRecord, RecordGate
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair, PeerId


class SimulatedRecords:
    """The newest record of each peer, and the signing of our own."""

    def __init__(self, key: KeyPair, network: str, coordinator_keys: Set[PeerId]) -> None:
        self._gate = RecordGate(network, coordinator_keys)
        self._signer = EndpointSigner(key, network)
        self._held: dict[str, PeerRecord] = {}

    def sign(self, certificate: bytes, address: str, now: float) -> PeerRecord:
        """Our own record, checked as others check it. Raises EnvelopeError."""
        data = self._signer.sign(certificate=certificate, addresses=(address,), now=now)
        return self._gate.check(data, now)

    def keep(self, record: PeerRecord) -> None:
        """Hold a record unless a newer one is held."""
        newest = records.newest(self._held.get(record.peer), record)
        if newest is not None:
            self._held[record.peer] = newest

    def held(self, peer: str) -> bytes | None:
        """The record of a peer, expired or not."""
        record = self._held.get(peer)
        return None if record is None else record.data

    def all(self) -> list[PeerRecord]:
        """Every record held."""
        return list(self._held.values())

    def newest(self, documents: Iterable[bytes], now: float) -> PeerRecord | None:
        """The newest of these that is valid now."""
        return records.newest(*(self._checked(data, now) for data in documents))

    def _checked(self, data: bytes, now: float) -> PeerRecord | None:
        try:
            return self._gate.check(data, now)
        except EnvelopeError:
            return None  # expired, or a withdrawal past its time
