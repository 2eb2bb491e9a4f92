"""The adverts a buyer knows, arranged so that a search does not look at each.

Every advert has a slot, a small number. For each constraint of `matching.explain` the index finds
the set of slots that pass it, without visiting them:

- equal or not (region, tier, assurance, image, GPU configuration): a set for each value;
- at least (free CPU, memory, disk, longest lease): sets over sorted buckets, where only the one
  bucket that the wanted value falls into is read item by item;
- price limit: a tree of boxes of price tables, where only boxes that the limit cuts are opened.

Sets are integers, so counting what each constraint excludes and intersecting what is left takes
microseconds for thousands of adverts. The cheapest of the rest come from the same tree, in order.
`matching.match` over all adverts is the specification; tests compare both.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush

from lumaris_protocol import matching, slot_sets
from lumaris_protocol.codec import Signed
from lumaris_protocol.matching import Match, MatchReport
from lumaris_protocol.messages.advert import Advert, Gpu, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.price_tree import PriceTree
from lumaris_protocol.slot_sets import Ordered, Postings

# Up to this many are sorted by seller as they are; of more, only the first are looked for.
_FEW = 64
# Expiries of replaced adverts wait in the heap; it is rebuilt when most of it is such.
_HEAP_SPARE = 64


class _Capacity:
    """Which slots have how much: of what is free, or of what a seller has in total."""

    def __init__(self) -> None:
        self._cpu, self._memory, self._disk = Ordered(), Ordered(), Ordered()
        self._gpus: Postings[tuple[Gpu, ...]] = Postings()

    def move(self, slot: int, old: Resources | None, new: Resources | None) -> None:
        """Change what a slot has; None before it is there and after it is gone."""
        orders = (self._cpu, self._memory, self._disk)
        for order, before, after in zip(orders, _numbers(old), _numbers(new), strict=True):
            _move(order, slot, before, after)
        had, has = old.gpus if old else (), new.gpus if new else ()
        if had != has:
            if had:
                self._gpus.remove(had, slot)
            if has:
                self._gpus.add(has, slot)

    def enough(self, wanted: Resources) -> dict[str, int]:
        """The slots that have what is wanted, under the code of those that have not."""
        found = {
            "cpu_short": self._cpu.at_least(wanted.cpu_millis),
            "memory_short": self._memory.at_least(wanted.memory_bytes),
            "disk_short": self._disk.at_least(wanted.disk_bytes),
        }
        if wanted.gpus:
            found["gpu_short"] = 0
            for gpus in self._gpus:  # machines with GPUs come in few kinds
                if matching.gpus_fit(wanted.gpus, gpus):
                    found["gpu_short"] |= self._gpus.get(gpus)
        return found


class OfferIndex:
    """The newest advert of each seller. Nothing here reads a clock: see `expire`."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._adverts: list[Signed[Advert] | None] = []
        self._unused: list[int] = []
        self._live = 0
        self._labels: Postings[Hashable] = Postings()
        self._free, self._total = _Capacity(), _Capacity()
        self._leases, self._sellers = Ordered(), Ordered()
        self._prices: dict[str, PriceTree] = {}
        self._expiries: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def adverts(self) -> tuple[Signed[Advert], ...]:
        """Every advert, in no order."""
        return tuple(advert for advert in self._adverts if advert is not None)

    def get(self, seller: str) -> Signed[Advert] | None:
        """The advert of a seller."""
        slot = self._slots.get(seller)
        return None if slot is None else self._adverts[slot]

    def put(self, advert: Signed[Advert]) -> None:
        """Take an advert in, in place of the one that its seller had."""
        message = advert.message
        slot = self._slots.get(message.seller)
        if slot is None:
            slot = self._unused.pop() if self._unused else self._grow()
            self._slots[message.seller] = slot
            self._sellers.add(message.seller, slot)
            self._live |= 1 << slot
            self._move(slot, None, message)
        else:
            held = self._adverts[slot]
            assert held is not None, "a seller's slot holds its advert"
            self._move(slot, held.message, message)
        self._adverts[slot] = advert
        heappush(self._expiries, (message.expires_at, message.seller))
        if len(self._expiries) > 2 * len(self._slots) + _HEAP_SPARE:
            self._expiries = [
                (item.message.expires_at, item.message.seller) for item in self.adverts
            ]
            heapify(self._expiries)

    def remove(self, seller: str) -> bool:
        """Forget a seller; whether it was known."""
        slot = self._slots.pop(seller, None)
        if slot is None:
            return False
        held = self._adverts[slot]
        assert held is not None, "a seller's slot holds its advert"
        self._move(slot, held.message, None)
        self._sellers.remove(seller, slot)
        self._live ^= 1 << slot
        self._adverts[slot] = None
        self._unused.append(slot)
        return True

    def expire(self, now: float) -> list[str]:
        """Forget what expires at `now` or before; the sellers it was of."""
        gone: list[str] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, seller = heappop(self._expiries)
            held = self.get(seller)
            if held is not None and held.message.expires_at <= now:
                self.remove(seller)
                gone.append(seller)
        return gone

    def search(
        self, needs: Requirements, *, lease_s: int, count: int, as_if_idle: bool = False
    ) -> MatchReport:
        """The best `count` sellers that fit, and how many each constraint excludes.

        With `as_if_idle` sellers are judged by what they have in total instead of what is free.
        """
        fitting, excluded = self._live, dict[str, int]()
        for code, passing in self._passing(needs, lease_s, as_if_idle).items():
            fitting &= passing
            missing = len(self._slots) - passing.bit_count()
            if missing:
                excluded[code] = missing
        number = fitting.bit_count()
        chosen = self._best(needs, lease_s, fitting, min(count, number))
        matches = tuple(self._match(needs, slot, price) for price, slot in chosen)
        return MatchReport(matches, len(self._slots), excluded, number)

    def explain(self, needs: Requirements, seller: str, *, lease_s: int) -> tuple[str, ...] | None:
        """Codes of all that keeps a seller from fitting; None when it is not known."""
        advert = self.get(seller)
        return None if advert is None else matching.explain(needs, advert.message, lease_s=lease_s)

    # --- inside ---

    def _passing(self, needs: Requirements, lease_s: int, as_if_idle: bool) -> dict[str, int]:
        """The slots that pass each constraint, by the code of those that do not."""
        labels, live = self._labels, self._live
        offering = labels.get(("tier", needs.tier))
        passing = {
            "withdrawn": live ^ labels.get("withdrawn"),
            "runtime_missing": offering,
            "duration_long": self._leases.at_least(lease_s),
            "price_high": self._affordable(needs),
            **(self._total if as_if_idle else self._free).enough(needs.resources),
        }
        if needs.excluded:
            known = [self._slots[seller] for seller in {*needs.excluded} if seller in self._slots]
            passing["peer_excluded"] = live ^ slot_sets.of_slots(known)
        if needs.regions:
            passing["region_excluded"] = self._any("region", needs.regions)
        if needs.assurances:
            held = self._any(needs.tier, needs.assurances)
            passing["assurance_low"] = live ^ (offering & ~held)
        features = matching.needed_features(needs)
        if features:
            held = offering
            for feature in features:
                held &= labels.get(("feature", needs.tier, feature))
            passing["feature_missing"] = live ^ (offering & ~held)
        if needs.tier != "wasm" and needs.image is not None and not needs.image_fetched:
            passing["image_missing"] = labels.get(("image", needs.image))
        return passing

    def _any(self, kind: str, values: tuple[str, ...]) -> int:
        bits = 0
        for value in values:
            bits |= self._labels.get((kind, value))
        return bits

    def _affordable(self, needs: Requirements) -> int:
        tree = self._prices.get(needs.currency)
        if tree is None:
            return 0
        if not needs.rate_nanos_max:
            return tree.bits
        return tree.up_to(needs.resources, needs.rate_nanos_max)

    def _best(
        self, needs: Requirements, lease_s: int, fitting: int, count: int
    ) -> list[tuple[int, int]]:
        """(price, slot) of the best slots, as `matching.match` orders them."""
        if not count:
            return []
        groups = self._prices[needs.currency].cheapest(needs.resources, lease_s, fitting, count)
        images = self._labels.get(("image", needs.image)) if needs.image is not None else 0
        chosen: list[tuple[int, int]] = []
        for price, slots in groups:
            if not slots & (slots - 1):  # one slot, as usual where prices differ
                chosen.append((price, slots.bit_length() - 1))
                continue
            holders = slots & images
            for group in (holders, slots ^ holders):
                chosen += [(price, slot) for slot in self._first(group, count - len(chosen))]
        return chosen[:count]

    def _first(self, group: int, count: int) -> list[int]:
        """The `count` slots of a group whose sellers come first."""
        if not group or not count:
            return []
        if group.bit_count() > _FEW:
            return self._sellers.first(group, count)
        slots = slot_sets.slots_of(group)
        slots.sort(key=lambda slot: self._at(slot).message.seller)
        return slots[:count]

    def _match(self, needs: Requirements, slot: int, price: int) -> Match:
        advert = self._at(slot)
        holds = needs.image is not None and needs.image in advert.message.cached
        return Match(advert, price, holds)

    def _at(self, slot: int) -> Signed[Advert]:
        advert = self._adverts[slot]
        assert advert is not None, "only used slots are in the sets"
        return advert

    def _grow(self) -> int:
        self._adverts.append(None)
        return len(self._adverts) - 1

    def _move(self, slot: int, old: Advert | None, new: Advert | None) -> None:
        """Let a slot say something else; only what differs is touched."""
        had, has = _labels(old), _labels(new)
        for label in had - has:
            self._labels.remove(label, slot)
        for label in has - had:
            self._labels.add(label, slot)
        self._free.move(slot, old.free if old else None, new.free if new else None)
        self._total.move(slot, old.total if old else None, new.total if new else None)
        _move(
            self._leases, slot, old.lease_s_max if old else None, new.lease_s_max if new else None
        )
        if old and new and old.prices == new.prices:
            return
        if old:
            tree = self._prices[old.prices.currency]
            if tree.bits == 1 << slot:
                del self._prices[old.prices.currency]
            else:
                tree.remove(old.prices, slot)
        if new:
            currency = new.prices.currency
            if currency in self._prices:
                self._prices[currency].add(new.prices, slot)
            else:
                self._prices[currency] = PriceTree(new.prices, slot)


def _labels(advert: Advert | None) -> set[Hashable]:
    """What a requirement can ask for by name. No region can be taken for a tier's assurance."""
    if advert is None:
        return set()
    labels: set[Hashable] = {("region", advert.region)}
    labels |= {("tier", runtime.tier) for runtime in advert.runtimes}
    labels |= {(runtime.tier, runtime.assurance) for runtime in advert.runtimes}
    labels |= {
        ("feature", runtime.tier, feature)
        for runtime in advert.runtimes
        for feature in runtime.features
    }
    labels |= {("image", image) for image in advert.cached}
    if advert.withdrawn:
        labels.add("withdrawn")
    return labels


def _numbers(resources: Resources | None) -> tuple[int | None, int | None, int | None]:
    if resources is None:
        return None, None, None
    return resources.cpu_millis, resources.memory_bytes, resources.disk_bytes


def _move(order: Ordered, slot: int, old: int | None, new: int | None) -> None:
    if old != new:
        if old is not None:
            order.remove(old, slot)
        if new is not None:
            order.add(new, slot)
