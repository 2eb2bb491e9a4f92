"""Sets of small numbers as integers: bit n is set when slot n is in the set.

Python's integers are arrays in C, so intersecting or counting sets of thousands of slots costs a
fraction of a microsecond. Two maps from values to such sets are built on that: `Postings` for
values that are equal or not, `Ordered` for values that are compared.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K")

# A set of up to this many slots is stored as such: a stranger's rare values then cost their own
# size, and not a bit for every slot there is.
_RARE_MAX = 16
# Larger buckets make a query slower (its boundary bucket is read item by item), smaller ones make
# a change slower (it touches one set for each bucket).
_BUCKET_MAX = 64
_FEW = 8


def of_slots(slots: Collection[int]) -> int:
    """The set of these slots."""
    if len(slots) <= _FEW:
        bits = 0
        for slot in slots:
            bits |= 1 << slot
        return bits
    room = bytearray((max(slots) >> 3) + 1)
    for slot in slots:
        room[slot >> 3] |= 1 << (slot & 7)
    return int.from_bytes(room, "little")


def slots_of(bits: int) -> list[int]:
    """The slots in a set, in rising order."""
    if not bits & (bits - 1):
        return [bits.bit_length() - 1] if bits else []
    text = f"{bits:b}"[::-1]
    slots, at = [], text.find("1")
    while at >= 0:
        slots.append(at)
        at = text.find("1", at + 1)
    return slots


class Postings(Generic[K]):
    """For each value, the slots that carry it."""

    def __init__(self) -> None:
        self._rare: dict[K, set[int]] = {}
        self._common: dict[K, int] = {}

    def __iter__(self) -> Iterator[K]:
        yield from self._rare
        yield from self._common

    def add(self, value: K, slot: int) -> None:
        """Let a slot carry a value; it must not yet."""
        if value in self._common:
            self._common[value] |= 1 << slot
            return
        slots = self._rare.setdefault(value, set())
        slots.add(slot)
        if len(slots) > _RARE_MAX:
            self._common[value] = of_slots(self._rare.pop(value))

    def remove(self, value: K, slot: int) -> bool:
        """Take a value from a slot; whether any other slot still carries it."""
        if value in self._common:
            self._common[value] ^= 1 << slot
            if not self._common[value]:
                del self._common[value]
                return False
            return True
        slots = self._rare[value]
        slots.remove(slot)
        if not slots:
            del self._rare[value]
        return bool(slots)

    def get(self, value: K) -> int:
        """The slots that carry a value."""
        slots = self._rare.get(value)
        return of_slots(slots) if slots is not None else self._common.get(value, 0)


class Ordered:
    """Slots sorted by a value each, in buckets.

    Beside each bucket stands the set of all slots from there to the end, so that "at least this
    value" is one such set and a part of one bucket.
    """

    def __init__(self) -> None:
        self._buckets: list[list[tuple[Any, int]]] = []
        self._lasts: list[tuple[Any, int]] = []
        self._tails: list[int] = [0]  # one more than there are buckets: after the last is nothing

    def add(self, value: Any, slot: int) -> None:
        """Give a slot a value; it must have none."""
        item = (value, slot)
        if not self._buckets:
            self._buckets, self._lasts, self._tails = [[item]], [item], [1 << slot, 0]
            return
        at = min(bisect_left(self._lasts, item), len(self._lasts) - 1)
        bucket = self._buckets[at]
        insort(bucket, item)
        self._lasts[at] = bucket[-1]
        self._flip(at, slot)
        if len(bucket) > _BUCKET_MAX:
            self._split(at)

    def remove(self, value: Any, slot: int) -> None:
        """Forget a slot, whose value must be this."""
        item = (value, slot)
        at = bisect_left(self._lasts, item)
        bucket = self._buckets[at]
        del bucket[bisect_left(bucket, item)]
        self._flip(at, slot)
        if bucket:
            self._lasts[at] = bucket[-1]
        else:
            del self._buckets[at], self._lasts[at], self._tails[at]

    def at_least(self, value: Any) -> int:
        """The slots with this value or a greater one."""
        item = (value, -1)
        at = bisect_left(self._lasts, item)
        if at == len(self._buckets):
            return 0
        bucket = self._buckets[at]
        cut = bisect_left(bucket, item)
        if cut * 2 <= len(bucket):
            return self._tails[at] ^ of_slots([slot for _, slot in bucket[:cut]])
        return self._tails[at + 1] | of_slots([slot for _, slot in bucket[cut:]])

    def first(self, bits: int, count: int) -> list[int]:
        """The `count` slots of a set that have the lowest values, in order."""
        found: list[int] = []
        for at, bucket in enumerate(self._buckets):
            here = (self._tails[at] ^ self._tails[at + 1]) & bits
            if here:
                within = set(slots_of(here))
                found += [slot for _, slot in bucket if slot in within]
            if len(found) >= count:
                break
        return found[:count]

    def _flip(self, last: int, slot: int) -> None:
        bit, tails = 1 << slot, self._tails
        for at in range(last + 1):
            tails[at] ^= bit

    def _split(self, at: int) -> None:
        bucket = self._buckets[at]
        left, right = bucket[: len(bucket) // 2], bucket[len(bucket) // 2 :]
        self._buckets[at : at + 1] = [left, right]
        self._lasts[at : at + 1] = [left[-1], right[-1]]
        self._tails.insert(at + 1, self._tails[at] ^ of_slots([slot for _, slot in left]))
