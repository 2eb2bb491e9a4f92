"""The sellers we know of: the highest advert of each, until it expires. Time is an argument."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lumaris_overlay.advert_filter import AdvertFacts, facts_of
from lumaris_overlay.ports import AdvertEvent
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import ADVERT_LIFETIME_S_MAX, CLOCK_SKEW_S, DIRECTORY_ADVERTS_MAX


@dataclass(frozen=True)
class _Entry:
    """What is remembered of a seller. An entry that is not live only keeps its seq from replay."""

    envelope: bytes
    seq: int
    live: bool
    addresses: tuple[str, ...]
    facts: AdvertFacts
    expires_at: float
    forget_at: float

    @property
    def due_at(self) -> float:
        """When time changes something about it."""
        return self.expires_at if self.live else self.forget_at


class Directory:
    """The highest advert of each seller. It never holds more than `size_max` sellers."""

    def __init__(self, gate: AdvertGate, *, size_max: int = DIRECTORY_ADVERTS_MAX) -> None:
        self._gate = gate
        self._size_max = size_max
        self._entries: dict[PeerId, _Entry] = {}
        self._envelopes: set[bytes] = set()
        self._order: list[PeerId] = []  # the sellers of `_entries`, sorted, for pages
        self._due_at = math.inf  # nothing expires before this

    def __len__(self) -> int:
        return sum(entry.live for entry in self._entries.values())

    def holds(self, data: bytes) -> bool:
        """Whether exactly this document is the newest of its seller."""
        return data in self._envelopes

    def offer(self, data: bytes, now: float) -> AdvertEvent | None:
        """Take a document in; None when it says nothing new. Raises EnvelopeError when invalid."""
        if data in self._envelopes:
            return None
        signed = self._gate.check(data, now)
        advert, seller = signed.message, signed.signer
        held = self._entries.get(seller)
        if held is not None and advert.seq <= held.seq:
            return None
        if held is None and len(self._entries) >= self._size_max:
            raise EnvelopeError("directory_full")
        if held is not None:
            self._envelopes.discard(held.envelope)
        if held is None:
            insort(self._order, seller)
        entry = self._entries[seller] = _Entry(
            envelope=data,
            seq=advert.seq,
            live=not advert.withdrawn,
            addresses=advert.addresses,
            facts=facts_of(advert),
            expires_at=advert.expires_at + CLOCK_SKEW_S,
            # An older advert was issued before this one, so none outlives this moment.
            forget_at=advert.issued_at + ADVERT_LIFETIME_S_MAX + 2 * CLOCK_SKEW_S,
        )
        self._envelopes.add(data)
        self._due_at = min(self._due_at, entry.due_at)
        if advert.withdrawn:
            if held is None or not held.live:
                return None
            return AdvertEvent(seller, None, advert.seq)
        return AdvertEvent(seller, data, advert.seq)

    def expire(self, now: float) -> list[AdvertEvent]:
        """Let go of what is past its time; the departures it caused."""
        gone: list[AdvertEvent] = []
        if now < self._due_at:
            return gone
        for seller, entry in list(self._entries.items()):
            if entry.live and entry.expires_at <= now:
                gone.append(AdvertEvent(seller, None, entry.seq))
                self._entries[seller] = replace(entry, live=False, addresses=())
            if entry.forget_at <= now:
                self._drop(seller)
        self._due_at = min((entry.due_at for entry in self._entries.values()), default=math.inf)
        return gone

    def revoke(self, sellers: Iterable[str], now: float) -> list[AdvertEvent]:
        """Forget those of these sellers whose advert the gate refuses by now; the departures."""
        gone: list[AdvertEvent] = []
        for seller in map(PeerId, sellers):
            entry = self._entries.get(seller)
            if entry is None:
                continue
            try:
                self._gate.check(entry.envelope, now)
            except EnvelopeError:
                self._drop(seller)
                if entry.live:
                    gone.append(AdvertEvent(seller, None, entry.seq))
        return gone

    def _drop(self, seller: PeerId) -> None:
        self._envelopes.discard(self._entries.pop(seller).envelope)
        del self._order[bisect_left(self._order, seller)]

    def events(self) -> list[AdvertEvent]:
        """The live adverts, as a newcomer is told of them."""
        return [
            AdvertEvent(seller, entry.envelope, entry.seq)
            for seller, entry in self._entries.items()
            if entry.live
        ]

    def snapshot(self) -> list[bytes]:
        """The live adverts' bytes."""
        return [entry.envelope for entry in self._entries.values() if entry.live]

    def page(
        self, after: str, count: int, admits: Callable[[AdvertFacts], bool] | None = None
    ) -> tuple[list[bytes], str]:
        """Documents of sellers behind `after` in order, withdrawals too, and where to go on.

        The cursor is "" when nothing is left. With `admits`, only those it lets through.
        """
        start = bisect_right(self._order, after)
        chosen: list[bytes] = []
        for seller in self._order[start:] if count else ():
            if len(chosen) == count:
                return chosen, after
            entry, after = self._entries[seller], seller
            if admits is None or admits(entry.facts):
                chosen.append(entry.envelope)
        return chosen, ""

    def envelope(self, seller: str) -> bytes | None:
        """The newest document of a seller, a withdrawal too."""
        entry = self._entries.get(PeerId(seller))
        return entry.envelope if entry is not None else None

    def addresses(self, seller: str) -> tuple[str, ...]:
        """Where the seller's advert says it can be reached."""
        entry = self._entries.get(PeerId(seller))
        return entry.addresses if entry is not None and entry.live else ()
