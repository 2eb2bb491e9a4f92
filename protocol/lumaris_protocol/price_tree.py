"""Price tables in a tree of boxes: the cheapest for any mix of resources, without pricing all.

Each node knows the lowest and the highest price of every component below it, so it has a least and
a greatest cost for any order. A search opens the node with the least cost first and stops when the
next one costs more than all it was asked for; a count of prices above a limit opens only nodes that
the limit cuts. Equal tables are one entry, so a market of identical prices is one box.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count as counter

from lumaris_protocol import pricing
from lumaris_protocol.limits import NANOS_MAX
from lumaris_protocol.messages.advert import PriceTable, Resources
from lumaris_protocol.slot_sets import Postings

_TABLES_MAX = 32  # of one leaf: only those that fit are priced, so a deeper tree gains little
# What one order is likely to hold of each component: a box is cut where its prices differ most.
_WEIGHTS = {
    "start_nanos": 1,
    "cpu_core_s_nanos": 600,
    "memory_gib_s_nanos": 600,
    "disk_gib_s_nanos": 150,
    "gpu_s_nanos": 15,
}

_Pick = Callable[[int, int], int]


class _Node:
    """A box of price tables: a leaf with the tables, or two halves cut at a price."""

    __slots__ = ("bits", "cut", "field", "least", "lower", "most", "tables", "upper")

    def __init__(self, tables: set[PriceTable], bits: int) -> None:
        self.tables, self.bits = tables, bits
        self.lower: _Node | None = None
        self.upper: _Node | None = None
        self.field, self.cut = "", 0
        self.fit(tables)

    def fit(self, tables: set[PriceTable]) -> None:
        """Make the box as small as what is in it."""
        self.least, self.most = _corner(tables, min), _corner(tables, max)

    def half(self, table: PriceTable) -> _Node | None:
        """Where a table belongs; None in a leaf."""
        if self.lower is None:
            return None
        return self.lower if getattr(table, self.field) < self.cut else self.upper

    def halves(self) -> tuple[_Node, _Node]:
        assert self.lower is not None
        assert self.upper is not None
        return self.lower, self.upper


class PriceTree:
    """The price tables of one currency, each with the slots of the sellers that ask it."""

    def __init__(self, table: PriceTable, slot: int) -> None:
        self._slots: Postings[PriceTable] = Postings()
        self._slots.add(table, slot)
        self._tables = {slot: table}
        self._root = _Node({table}, 1 << slot)

    @property
    def bits(self) -> int:
        """All slots in the tree."""
        return self._root.bits

    def add(self, table: PriceTable, slot: int) -> None:
        """Put a slot under its prices."""
        self._slots.add(table, slot)
        self._tables[slot] = table
        node, bit = self._root, 1 << slot
        while True:
            node.bits |= bit
            node.least, node.most = _wider(node.least, table, min), _wider(node.most, table, max)
            half = node.half(table)
            if half is None:
                break
            node = half
        node.tables.add(table)
        if len(node.tables) > _TABLES_MAX:
            self._cut(node)

    def remove(self, table: PriceTable, slot: int) -> None:
        """Take a slot out; it must be there under these prices, and not be the tree's last."""
        shared = self._slots.remove(table, slot)
        del self._tables[slot]
        path, bit = [self._root], 1 << slot
        while (half := path[-1].half(table)) is not None:
            path.append(half)
        for node in path:
            node.bits ^= bit
        if shared:
            return
        leaf = path.pop()
        leaf.tables.remove(table)
        if leaf.tables:
            leaf.fit(leaf.tables)
        elif path:
            parent = path.pop()
            low, high = parent.halves()
            self._replace(path, parent, high if low is leaf else low)
        for node in reversed(path):
            low, high = node.halves()
            node.least = _corner((low.least, high.least), min)
            node.most = _corner((low.most, high.most), max)

    def cheapest(
        self, wanted: Resources, lease_s: int, among: int, count: int
    ) -> list[tuple[int, int]]:
        """(price of the lease, slots at that price) for the cheapest `count` slots in `among`.

        The last price may have more slots than are needed: its order is the caller's.
        """
        found: dict[int, int] = {}  # slots by price
        lowest: list[int] = []  # the lowest prices found, one for each slot, at most `count`
        worst = NANOS_MAX
        price_of = pricing.lease_of(wanted, lease_s)
        queue, order = [(0, 0, self._root)], counter()
        while queue:
            bound, _, node = heappop(queue)
            if bound > worst:
                break
            if node.lower is not None:
                for half in node.halves():
                    if half.bits & among:
                        price = price_of(half.least)
                        heappush(queue, (price, next(order), half))
                continue
            for table, hits, number in self._hits(node, among):
                price = price_of(table)
                if price <= worst:
                    found[price] = found.get(price, 0) | hits
                    for _ in range(min(number, count)):
                        insort(lowest, price)
                    if len(lowest) >= count:
                        del lowest[count:]
                        worst = lowest[-1]
        return [item for item in sorted(found.items()) if item[0] <= worst]

    def up_to(self, wanted: Resources, rate_max: int) -> int:
        """The slots whose rate for these resources is at most `rate_max`."""
        rate_of = pricing.rate_of(wanted)
        found, queue = 0, [self._root]
        while queue:
            node = queue.pop()
            if rate_of(node.least) > rate_max:
                continue
            if rate_of(node.most) <= rate_max:
                found |= node.bits
            elif node.lower is not None:
                queue += node.halves()
            else:
                for table in node.tables:
                    if rate_of(table) <= rate_max:
                        found |= self._slots.get(table)
        return found

    def _hits(self, leaf: _Node, among: int) -> Iterator[tuple[PriceTable, int, int]]:
        """The tables of a leaf that slots in `among` ask, with those slots and their number."""
        here = leaf.bits & among
        if here.bit_count() > len(leaf.tables):
            for table in leaf.tables:
                hits = self._slots.get(table) & here
                yield table, hits, hits.bit_count()
            return
        while here:
            bit = here & -here
            here ^= bit
            yield self._tables[bit.bit_length() - 1], bit, 1

    def _cut(self, leaf: _Node) -> None:
        """Make two leaves of one, at the median of the price that differs most."""
        field = max(_WEIGHTS, key=lambda name: _spread(leaf, name) * _WEIGHTS[name])
        prices = sorted(getattr(table, field) for table in leaf.tables)
        middle = prices[len(prices) // 2]
        cut = middle if middle > prices[0] else next(one for one in prices if one > middle)
        leaf.field, leaf.cut = field, cut
        lower = {table for table in leaf.tables if getattr(table, field) < cut}
        upper = leaf.tables - lower
        leaf.lower = _Node(lower, self._bits_of(lower))
        leaf.upper = _Node(upper, self._bits_of(upper))
        leaf.tables = set()

    def _bits_of(self, tables: set[PriceTable]) -> int:
        bits = 0
        for table in tables:
            bits |= self._slots.get(table)
        return bits

    def _replace(self, path: list[_Node], old: _Node, new: _Node) -> None:
        """Put a node in the place of its parent, which has lost its other half."""
        if not path:
            self._root = new
        elif path[-1].lower is old:
            path[-1].lower = new
        else:
            path[-1].upper = new


def _corner(tables: Iterable[PriceTable], pick: _Pick) -> PriceTable:
    first, *rest = tables
    for table in rest:
        first = _wider(first, table, pick)
    return first


def _wider(corner: PriceTable, table: PriceTable, pick: _Pick) -> PriceTable:
    return PriceTable(
        currency=corner.currency,
        start_nanos=pick(corner.start_nanos, table.start_nanos),
        cpu_core_s_nanos=pick(corner.cpu_core_s_nanos, table.cpu_core_s_nanos),
        memory_gib_s_nanos=pick(corner.memory_gib_s_nanos, table.memory_gib_s_nanos),
        disk_gib_s_nanos=pick(corner.disk_gib_s_nanos, table.disk_gib_s_nanos),
        gpu_s_nanos=pick(corner.gpu_s_nanos, table.gpu_s_nanos),
    )


def _spread(node: _Node, field: str) -> int:
    spread: int = getattr(node.most, field) - getattr(node.least, field)
    return spread
