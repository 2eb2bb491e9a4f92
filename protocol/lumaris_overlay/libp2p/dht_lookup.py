"""A look-up in the DHT: a few walks towards a place that share no peer.

Each walk begins at peers of its own, asks the nearest peer it has heard of, learns of nearer ones,
and ends when the nearest it knows have answered. A liar can lead its own walk astray, not those it
never meets. It gets little out of inventing peers near the place either: each invented one that
does not answer puts the others of the same source behind.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from lumaris_overlay.libp2p.dht_wire import Named, place_of

PATHS = 3
# A walk ends when this many peers nearer than any it still knows have answered.
ENOUGH = 4
# Peers a walk asks at most: three times what an honest network of a million needs.
_ASKED_MAX = 24
# Questions of one walk in flight: a dead peer costs its time-out, so another is asked meanwhile.
_PARALLEL = 2
# Others go on for this long when one walk has ended.
_GRACE_S = 2.0
_CANDIDATES_MAX = 256

# Asks one peer; the peers it named, or None when it did not answer or lied.
Ask = Callable[[Named], Awaitable[Sequence[Named] | None]]


@dataclass
class _Candidate:
    named: Named
    distance: int
    sources: list[str] = field(default_factory=list)


class Lookup:
    """One look-up. `answered` are the peers of each walk that answered, in order of distance."""

    def __init__(
        self,
        place: int,
        me: str,
        starts: Sequence[Named],
        ask: Ask,
        *,
        rng: random.Random,
        paths: int = PATHS,
    ) -> None:
        self.asked = 0
        self._place, self._ask = place, ask
        # Peers that are on a walk: no other walk asks them. We never ask ourselves.
        self._claimed = {me}
        # Who did not answer where it was said to be: a liar's word closes no way to a peer that
        # another names elsewhere.
        self._failed: set[Named] = set()
        dealt = list(starts)
        rng.shuffle(dealt)
        self._walks = [_Walk(self, dealt[number::paths]) for number in range(paths)]

    async def run(self) -> None:
        """Walk until every walk has ended or the first one has waited long enough for the rest."""
        async with trio.open_nursery() as nursery:

            async def one(walk: _Walk) -> None:
                await walk.run()
                if walk.answered:
                    latest = trio.current_time() + _GRACE_S
                    scope = nursery.cancel_scope
                    scope.deadline = min(scope.deadline, latest)

            for walk in self._walks:
                nursery.start_soon(one, walk)

    def nearest(self, per_walk: int) -> list[Named]:
        """The nearest peers that answered on each walk."""
        return [named for walk in self._walks for named in walk.nearest(per_walk)]

    def claim(self, named: Named) -> bool:
        """Take a peer for one walk; False when it is not open."""
        if not self.open(named):
            return False
        self._claimed.add(named.peer)
        return True

    def open(self, named: Named) -> bool:
        """Whether no walk has this peer, and it has not failed at these addresses."""
        return named.peer not in self._claimed and named not in self._failed

    async def ask(self, named: Named) -> Sequence[Named] | None:
        """Ask one peer. One that does not answer is free for a walk that hears other addresses."""
        self.asked += 1
        closer = await self._ask(named)
        if closer is None:
            self._failed.add(named)
            self._claimed.discard(named.peer)
        return closer

    def distance(self, peer: str) -> int:
        """How far a peer is from where we go."""
        return place_of(peer) ^ self._place


class _Walk:
    def __init__(self, lookup: Lookup, starts: Sequence[Named]) -> None:
        self.answered: list[tuple[int, Named]] = []
        self._lookup = lookup
        self._candidates: dict[str, _Candidate] = {}
        # By source: how many of the peers it named failed, less those that answered.
        self._failures: dict[str, int] = {}
        self._asked = self._flying = 0
        self._changed = trio.Event()
        for named in starts:
            self._hear(named, source="")

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(_PARALLEL):
                nursery.start_soon(self._work)

    def nearest(self, count: int) -> list[Named]:
        return [named for _, named in sorted(self.answered, key=lambda item: item[0])[:count]]

    async def _work(self) -> None:
        while True:
            candidate = self._pick()
            if candidate is None:
                if not self._flying:
                    return
                await self._changed.wait()
                continue
            self._asked += 1
            self._flying += 1
            closer = await self._lookup.ask(candidate.named)
            self._flying -= 1
            for source in candidate.sources:
                worse = 1 if closer is None else -1
                self._failures[source] = max(0, self._failures.get(source, 0) + worse)
            if closer is not None:
                self.answered.append((candidate.distance, candidate.named))
                for named in closer:
                    self._hear(named, source=candidate.named.peer)
            self._changed.set()
            self._changed = trio.Event()

    def _hear(self, named: Named, *, source: str) -> None:
        known = self._candidates.get(named.peer)
        if known is not None:
            if source not in known.sources:
                known.sources.append(source)
        elif self._lookup.open(named) and len(self._candidates) < _CANDIDATES_MAX:
            distance = self._lookup.distance(named.peer)
            self._candidates[named.peer] = _Candidate(named, distance, [source])

    def _pick(self) -> _Candidate | None:
        """The next peer to ask, which is then this walk's; None when it is done for now."""
        while self._candidates and self._asked < _ASKED_MAX:
            best = min(self._candidates.values(), key=self._rank)
            nearer = sum(distance < best.distance for distance, _ in self.answered)
            if nearer >= ENOUGH:
                return None
            del self._candidates[best.named.peer]
            if self._lookup.claim(best.named):
                return best
        return None

    def _rank(self, candidate: _Candidate) -> tuple[int, int]:
        return min(self._failures.get(s, 0) for s in candidate.sources), candidate.distance
