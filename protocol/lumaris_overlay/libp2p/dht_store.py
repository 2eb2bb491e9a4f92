"""What a host keeps for others in the DHT: checked records, bounded, until they expire."""

from __future__ import annotations

from lumaris_overlay.libp2p.dht_wire import (
    index_key,
    pack,
    peer_key,
    place_of,
    place_of_key,
    read_key,
    unpack,
)
from lumaris_overlay.records import PeerRecord, RecordGate
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import DHT_INDEX_PEERS_MAX, SHARDS_MAX

# Ten copies of each record: a host holds about ten; this is room for a flood, at most 12 MB.
_RECORDS_MAX = 4_096


class RecordStore:
    """Records by key. Each is the signer's own word, so holders need no trust, only bounds."""

    def __init__(self, me: PeerId, gate: RecordGate, *, records_max: int = _RECORDS_MAX) -> None:
        self._me = place_of(me)
        self._gate = gate
        self._records_max = records_max
        self._peers: dict[str, PeerRecord] = {}
        self._index: dict[int, dict[str, PeerRecord]] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def peer(self, peer: str, now: float) -> PeerRecord | None:
        """The record held of a peer, while honest peers would take it."""
        record = self._peers.get(peer)
        return record if record is not None and record.alive(now) else None

    def get(self, key: bytes, now: float) -> bytes | None:
        """The value of a key. Raises EnvelopeError `malformed` when it is not a key."""
        found = read_key(key)
        if isinstance(found, str):
            record = self.peer(found, now)
            return None if record is None else record.data
        records = [r.data for r in self._index.get(found, {}).values() if r.alive(now)]
        return pack(records) if records else None

    def put(self, key: bytes, value: bytes, now: float) -> bool:
        """Keep a value; False when a newer one is held or there is no room.

        Raises EnvelopeError with the code of what is wrong with it.
        """
        found = read_key(key)
        if isinstance(found, str):
            held = self._peers.get(found)
            if held is not None and held.data == value:
                return held.alive(now)
            return self._put_peer(self.check_peer(found, value, now), held)
        return all(self._put_index(found, record) for record in self.check_index(found, value, now))

    def check_peer(self, peer: str, value: bytes, now: float) -> PeerRecord:
        """The record of this peer in a value. Raises EnvelopeError."""
        record = self._gate.check(value, now)
        if record.peer != peer:
            raise EnvelopeError("wrong_signer", f"A record of {record.peer} for {peer}.")
        return record

    def check_index(
        self, shard: int, value: bytes, now: float, *, count_max: int = 1
    ) -> list[PeerRecord]:
        """The index peers of this shard in a value. Raises EnvelopeError."""
        records = [self._gate.check(data, now) for data in unpack(value, count_max)]
        for record in records:
            if "index" not in record.services or shard not in record.shards:
                raise EnvelopeError("wrong_type", f"{record.peer} is no index peer of {shard}.")
        return records

    def expire(self, now: float) -> None:
        """Let go of what no honest peer takes any more."""
        for peer in [p for p, record in self._peers.items() if not record.alive(now)]:
            del self._peers[peer]
        for shard, held in list(self._index.items()):
            for peer in [p for p, record in held.items() if not record.alive(now)]:
                del held[peer]
            if not held:
                del self._index[shard]

    def _put_peer(self, record: PeerRecord, held: PeerRecord | None) -> bool:
        if held is not None and held.order > record.order:
            return False
        if held is None and len(self._peers) >= self._records_max:
            # The records nearest to us are those that others will ask us for.
            farthest = max(self._peers, key=lambda peer: place_of_key(peer_key(peer)) ^ self._me)
            if place_of_key(peer_key(farthest)) ^ self._me <= (
                place_of_key(peer_key(record.peer)) ^ self._me
            ):
                return False
            del self._peers[farthest]
        self._peers[record.peer] = record
        return True

    def _is_named_now(self, record: PeerRecord) -> bool:
        """Whether no newer word of the peer is held; what its newest does not name goes.

        So a peer is held under as many shards as one record names, whatever it signs in a row.
        """
        found = [held[record.peer] for held in self._index.values() if record.peer in held]
        if any(each.order > record.order for each in found):
            return False
        for shard in [s for s, held in self._index.items() if record.peer in held]:
            if shard not in record.shards:
                del self._index[shard][record.peer]
                if not self._index[shard]:
                    del self._index[shard]
        return True

    def _room_for(self, shard: int) -> bool:
        """Make room for a shard's key at the cost of one that is farther from us."""
        if shard in self._index or len(self._index) < SHARDS_MAX:
            return True
        farthest = max(self._index, key=self._distance)
        if self._distance(farthest) <= self._distance(shard):
            return False
        del self._index[farthest]
        return True

    def _distance(self, shard: int) -> int:
        return place_of_key(index_key(shard)) ^ self._me

    def _put_index(self, shard: int, record: PeerRecord) -> bool:
        if not self._is_named_now(record) or not self._room_for(shard):
            return False
        held = self._index.setdefault(shard, {})
        before = held.get(record.peer)
        if before is not None and before.order > record.order:
            return False
        held[record.peer] = record
        if len(held) > DHT_INDEX_PEERS_MAX:
            # By distance, not by time: holders agree on who stays, and nobody gets in by hurrying.
            place = place_of_key(index_key(shard))
            del held[max(held, key=lambda peer: place_of(peer) ^ place)]
        return record.peer in held
