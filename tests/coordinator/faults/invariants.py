"""What must hold after every failure, by SQL and a tree of its own: one check for all tests.

It reads the store as a stranger with the file would, and shares no query with the coordinator;
the operator's own check must agree with it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import anyio
import httpx

from lumaris_coordinator import Settings
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.upkeep import commands
from lumaris_protocol import codec, merkle, receipts
from lumaris_protocol.ids import digest
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.messages.receipt import Receipt
from tests.coordinator.builders import NETWORK, Deal, Market

FUNDS = 10_000_000


@dataclass
class Told:
    """What clients sent, and what they were told of it."""

    grants: dict[bytes, bytes] = field(default_factory=dict)
    receipts: dict[bytes, bytes] = field(default_factory=dict)
    refused: list[httpx.Response] = field(default_factory=list)
    deals: dict[bytes, Deal] = field(default_factory=dict)

    async def grant(self, market: Market, deal: Deal) -> bytes:
        """A grant that was acknowledged."""
        request = deal.grant_request()
        self.grants[request] = await market.grant(deal)
        return self.grants[request]

    async def settle(self, market: Market, claim: bytes) -> None:
        """Send a claim; whether it was kept is known only where a receipt came."""
        try:
            answer = await market.settle(claim)
        except httpx.TransportError:
            return
        if answer.status_code == 200:
            self.receipts[claim] = receipts.decode_bundle(answer.content).receipt
        else:
            self.refused.append(answer)

    async def settle_all(self, market: Market, claims: Iterable[bytes]) -> None:
        """All at once."""
        async with anyio.create_task_group() as tasks:
            for claim in claims:
                tasks.start_soon(self.settle, market, claim)

    async def claims(self, market: Market, number: int, *, name: str = "") -> list[bytes]:
        """Claims of sessions that are granted and not settled."""
        buyer = await market.party(f"buyer{name}", FUNDS)
        seller = await market.party(f"seller{name}")
        deals = [market.deal(buyer, seller, cap=1_000) for _ in range(number)]
        found = [deal.claim(seller, await self.grant(market, deal), 600) for deal in deals]
        self.deals.update(zip(found, deals, strict=True))
        return found

    async def again(self, market: Market, more: Iterable[bytes] = ()) -> None:
        """The same bytes get the same answers; claims that got none before get one now."""
        for request, grant in self.grants.items():
            answer = await market.client.post("/v1/grants", content=request)
            assert answer.content == grant, answer.text
        for claim in more:
            await self.settle(market, claim)
            assert claim in self.receipts, self.refused[-1].text
        for claim, receipt in self.receipts.items():
            answer = await market.settle(claim)
            assert receipts.decode_bundle(answer.content).receipt == receipt
            report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
            assert report.verdict == "valid"


def hold(settings: Settings, told: Told, *, coordinator: str) -> None:
    """Everything adds up, and everything that was acknowledged is there, once."""
    with backend_of(settings.state, settings.database).snapshot() as connection:
        _money(connection)
        _escrows(connection)
        _numbers(connection)
        _log(connection, public_key_of(coordinator))
        _acknowledged(connection, told)
    report = commands.check(settings)
    assert report.sound, report.problems


def states(settings: Settings, claims: Iterable[bytes], told: Told) -> list[str]:
    """The states of the escrows that claims are of."""
    with backend_of(settings.state, settings.database).snapshot() as connection:
        rows = all_rows(connection, "SELECT agreement_hash, state FROM escrow")
    found: dict[str, str] = dict(rows)
    return [str(found[told.deals[claim].hash]) for claim in claims]


def _money(connection: Connection) -> None:
    rows = all_rows(connection, "SELECT id, kind, currency, balance FROM account")
    replayed: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for debit, credit, amount in all_rows(connection, "SELECT debit, credit, amount FROM transfer"):
        replayed[debit] -= amount
        replayed[credit] += amount
    for name, kind, currency, balance in rows:
        assert balance == replayed[name], f"{name} is not what its transfers add up to"
        assert balance >= 0 or kind == "external", f"{name} is below zero"
        sums[currency] += balance
    assert not any(sums.values()), f"not everything adds up to 0: {sums}"


def _escrows(connection: Connection) -> None:
    """Each escrow held its cap, gave all of it when it ended, and moved as the table says."""
    flows: Counter[tuple[str, str]] = Counter()
    for debit, credit, amount in all_rows(connection, "SELECT debit, credit, amount FROM transfer"):
        flows["in", credit] += amount
        flows["out", debit] += amount
    sql = "SELECT agreement_hash, account, cap, paid, voucher_total, state FROM escrow"
    for name, account, cap, paid, vouchered, state in all_rows(connection, sql):
        assert flows["in", account] == cap, f"{name} did not get its cap"
        given = cap if state in ESCROW.final else paid
        assert flows["out", account] == given, f"{name} did not give {given}"
        assert 0 <= paid <= cap >= vouchered, f"{name} paid more than its cap"
        assert _moves(connection, name)[-1][2] == state, f"{name} did not move to {state}"


def _moves(connection: Connection, name: str) -> list[tuple[str, str, str]]:
    sql = "SELECT before, fact, after FROM escrow_event WHERE agreement_hash = ? ORDER BY n"
    moves = [(str(a), str(b), str(c)) for a, b, c in all_rows(connection, sql, (name,))]
    assert moves[0][2] == ESCROW.initial, f"{name} began as {moves[0][2]}"
    for (_, _, left), (before, fact, after) in pairwise(moves):
        row = ESCROW.find(before, fact)
        assert row is not None, f"{name}: {fact} is no move of {before}"
        assert (before, after) == (left, row.next), f"{name} moved from {left} to {after}"
    sql = "SELECT count(*) FROM event WHERE ref = ? AND kind LIKE 'escrow.%'"
    told = all_rows(connection, sql, (name,))
    if all_rows(connection, "SELECT 1 FROM event WHERE id = 1"):  # none was forgotten yet
        assert told == [(len(moves),)], f"not one event for each move of {name}"
    return moves


def _numbers(connection: Connection) -> None:
    for table in ("txn", "transfer", "event"):
        rows = all_rows(connection, f"SELECT id FROM {table} ORDER BY id")
        begin = int(rows[0][0]) if rows and table == "event" else 1  # old events are forgotten
        ids = [int(row[0]) for row in rows]
        assert ids == list(range(begin, begin + len(rows))), f"{table} has gaps"


def _log(connection: Connection, key: bytes) -> None:
    """Every head is signed and is the tree over the first leaves, so each extends the last."""
    leaves = [
        bytes(row[0]) for row in all_rows(connection, "SELECT commitment FROM leaf ORDER BY leaf")
    ]
    documents = all_rows(connection, "SELECT leaf, salt, envelope FROM receipt")
    for leaf, salt, envelope in documents:
        inner = hashlib.sha256(bytes(salt) + bytes(envelope)).digest()
        assert leaves[leaf] == inner, f"leaf {leaf} is of another document"
    hashes = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    heads = all_rows(connection, "SELECT size, note FROM checkpoint ORDER BY size")
    for size, note in heads:
        head = merkle.open_checkpoint(note, key)
        root = _root(hashes[:size])
        assert (head.size, head.root) == (size, root), f"head {size} is of another tree"
    assert max([0, *(size for size, _ in heads)]) == len(leaves), "leaves without a head"


def _root(hashes: list[bytes]) -> bytes:
    """RFC 6962, section 2.1."""
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << ((len(hashes) - 1).bit_length() - 1)
    left, right = _root(hashes[:split]), _root(hashes[split:])
    return hashlib.sha256(b"\1" + left + right).digest()


def _acknowledged(connection: Connection, told: Told) -> None:
    grants = Counter(
        digest(row[0]) for row in all_rows(connection, "SELECT budget_grant FROM escrow")
    )
    for grant in told.grants.values():
        assert grants[digest(grant)] == 1, "a grant that was acknowledged is not there"
    kept = Counter(digest(row[0]) for row in all_rows(connection, "SELECT envelope FROM receipt"))
    for receipt in told.receipts.values():
        assert kept[digest(receipt)] == 1, "a receipt that was acknowledged is not there"
        found = codec.open_signed(receipt, Receipt, network=NETWORK).message
        parts = found.seller_nanos + found.fee_nanos + found.refund_nanos
        assert parts == found.cap_nanos, "a receipt divides another sum than its cap"
        sql = "SELECT state, paid FROM escrow WHERE agreement_hash = ?"
        rows = all_rows(connection, sql, (found.agreement_hash,))
        assert rows == [("settled", found.paid_nanos)], f"{rows} is not what the receipt says"
