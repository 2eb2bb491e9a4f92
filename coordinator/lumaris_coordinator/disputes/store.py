"""Rows of disputes. Every move of state goes through `advance`, by the protocol's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.limits import (
    CHECKER_CANDIDATES_MAX,
    CHECKER_WEIGHT_NANOS_MAX,
    REFUNDED_ORDERS_MAX,
)
from lumaris_protocol.machines.dispute import DISPUTE, OPEN
from lumaris_protocol.machines.table import Machine
from lumaris_protocol.messages.dispute import Candidate

_EVENTS_SHOWN_MAX: Final = 64  # a dispute has at most 16 bundles, 3 draws and 3 ends
_NUMBER_MAX: Final = 2**62
# A peer's bond in a currency answers in these: with parameters 1 and 2.
_AGAINST: Final = "currency = ?1 AND opener <> ?2 AND (buyer = ?2 OR seller = ?2)"
_IS_OPEN: Final = "state IN ('opened', 'evidence', 'checking')"


@dataclass(frozen=True)
class Dispute:
    """One row. `number` counts disputes; amounts are nanos; documents are kept as signed.

    `opened` is the hash of the opening, which stands in the log; `due_at` is when time is next
    asked what follows, `stake` what it holds of the respondent's bond and `wanted` the most that it
    could take of it then, `refund_max` what of the payment it holds a stake for, `vouchered` the
    highest voucher that was shown, and `fault` whom the ruling names. `refunded` was given back to
    the buyer; `owed` is what the ruling could not collect because of other disputes, `owed_refund`
    the buyer's refund in it.
    """

    id: str
    number: int
    agreement_hash: str
    buyer: str
    seller: str
    opener: str
    opened: str
    claim: str
    order_n: int
    currency: str
    amount: int
    bond: int
    stake: int
    wanted: int
    refund_max: int
    vouchered: int
    frozen: int
    state: str
    version: int
    opened_at: int
    evidence_until: int
    check_until: int | None
    due_at: int
    split_by_buyer: bytes | None
    split_by_seller: bytes | None
    withdrawal: bytes | None
    ruling: bytes | None
    fault: str
    refunded: int
    owed: int
    owed_refund: int
    ended_at: int | None

    @property
    def open(self) -> bool:
        """Whether it waits for something."""
        return self.state in OPEN

    @property
    def respondent(self) -> str:
        """The party that did not open it."""
        return self.seller if self.opener == self.buyer else self.buyer

    @property
    def deadline(self) -> int:
        """Until when evidence is taken."""
        return max(self.evidence_until, self.check_until or 0)

    @property
    def agreed(self) -> tuple[bytes, ...]:
        """The signed end: a withdrawal, or both copies of a split, or nothing."""
        if self.withdrawal is not None:
            return (self.withdrawal,)
        if self.split_by_buyer is None or self.split_by_seller is None:
            return ()
        return (self.split_by_buyer, self.split_by_seller)


@dataclass(frozen=True)
class Entry:
    """That a party has shown something: a bundle of evidence, or as number 0 the opening itself."""

    n: int
    party: str
    done: bool
    hash: str


@dataclass(frozen=True)
class Bundle(Entry):
    """An entry with its signed document."""

    envelope: bytes


_COLUMNS: Final = tuple(field.name for field in fields(Dispute))
_SELECT: Final = "SELECT " + ", ".join(_COLUMNS) + " FROM dispute"


def find(connection: Connection, dispute: str) -> Dispute | None:
    """A dispute by its id."""
    row = first(connection, _SELECT + " WHERE id = ?", (dispute,))
    return Dispute(*row) if row else None


def page(connection: Connection, peers: Sequence[str], *, after: int, limit: int) -> list[Dispute]:
    """Disputes that one of the peers is a party of, with a number above `after`."""
    marks = ", ".join("?" * len(peers))
    rows = all_rows(
        connection,
        f"{_SELECT} WHERE number > ? AND (buyer IN ({marks}) OR seller IN ({marks}))"
        " ORDER BY number LIMIT ?",
        (after, *peers, *peers, limit),
    )
    return [Dispute(*row) for row in rows]


def open_of(connection: Connection, opener: str) -> int:
    """How many disputes of an opener are open."""
    row = first(
        connection,
        f"SELECT count(*) FROM dispute WHERE opener = ? AND {_IS_OPEN}",
        (opener,),
    )
    return int(row[0]) if row else 0


def bonds_in(connection: Connection, openers: Sequence[str]) -> dict[str, int]:
    """Nanos that these peers have put down in disputes that are open, by currency."""
    if not openers:
        return {}
    marks = ", ".join("?" * len(openers))
    rows = all_rows(
        connection,
        f"SELECT currency, sum(bond) FROM dispute WHERE opener IN ({marks}) AND {_IS_OPEN}"
        " GROUP BY currency",
        tuple(openers),
    )
    return {str(currency): int(held) for currency, held in rows}


def asked_for(connection: Connection, agreement_hash: str) -> tuple[int, int]:
    """What the open disputes over an escrow's money ask together, and the highest voucher shown."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(amount), 0) AS BIGINT), coalesce(max(vouchered), 0) FROM dispute"
        f" WHERE agreement_hash = ? AND frozen = 1 AND {_IS_OPEN}",
        (agreement_hash,),
    )
    assert row is not None
    return int(row[0]), int(row[1])


def made_by(connection: Connection, agreement_hash: str, opener: str) -> int:
    """How many disputes a party ever opened about an agreement."""
    row = first(
        connection,
        "SELECT count(*) FROM dispute WHERE agreement_hash = ? AND opener = ?",
        (agreement_hash, opener),
    )
    return int(row[0]) if row else 0


def due(connection: Connection, *, now: int, limit: int) -> list[str]:
    """Open disputes that time acts on, the longest due first."""
    rows = all_rows(
        connection,
        f"SELECT id FROM dispute WHERE {_IS_OPEN} AND due_at < ? ORDER BY due_at, number LIMIT ?",
        (now, limit),
    )
    return [str(row[0]) for row in rows]


def set_due(connection: Connection, dispute: str, at: int) -> None:
    """Ask again what follows after some time. What was looked at goes behind what was not."""
    connection.execute("UPDATE dispute SET due_at = ? WHERE id = ?", (at, dispute))


def awaited(connection: Connection, peer: str, currency: str, *, before: int | None) -> int:
    """Nanos of a peer's bond that disputes may still take: open ones that hold less than they can
    take, and ended ones that are owed; those with a number below `before`, or all."""
    number = _NUMBER_MAX if before is None else before
    lacking = first(
        connection,
        "SELECT CAST(coalesce(sum(CASE WHEN wanted > stake THEN wanted - stake ELSE 0 END), 0)"
        f" AS BIGINT) FROM dispute WHERE {_IS_OPEN} AND {_AGAINST} AND number < ?3",
        (currency, peer, number),
    )
    owed = owed_in_all(connection, peer, currency, before=number)
    return owed + (int(lacking[0]) if lacking else 0)


def owed_in_all(
    connection: Connection, peer: str, currency: str, *, before: int | None = None
) -> int:
    """Nanos that ended disputes are owed from a peer's bond; those with a number below `before`,
    or all."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(owed), 0) AS BIGINT) FROM dispute"
        f" WHERE owed > 0 AND {_AGAINST} AND number < ?3",
        (currency, peer, _NUMBER_MAX if before is None else before),
    )
    return int(row[0]) if row else 0


def held_by_others(connection: Connection, dispute: Dispute) -> int:
    """Nanos of the respondent's bond that other open disputes hold."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(stake), 0) AS BIGINT) FROM dispute"
        f" WHERE {_IS_OPEN} AND {_AGAINST} AND number <> ?3",
        (dispute.currency, dispute.respondent, dispute.number),
    )
    return int(row[0]) if row else 0


def owed_by(connection: Connection, peer: str, currency: str, *, limit: int) -> list[Dispute]:
    """Ended disputes that a peer's bond still owes, the earliest first."""
    rows = all_rows(
        connection,
        f"{_SELECT} WHERE owed > 0 AND {_AGAINST} ORDER BY number LIMIT ?3",
        (currency, peer, limit),
    )
    return [Dispute(*row) for row in rows]


def owed_about(connection: Connection, agreement_hash: str) -> list[Dispute]:
    """Ended disputes of an agreement that a refund is owed for, the earliest first; at most as many
    as its parties may open."""
    rows = all_rows(
        connection,
        f"{_SELECT} WHERE agreement_hash = ? AND owed_refund > 0 ORDER BY number",
        (agreement_hash,),
    )
    return [Dispute(*row) for row in rows]


def bonds_owing(connection: Connection, *, limit: int) -> list[tuple[str, str]]:
    """(peer, currency) of bonds with money that something is owed from."""
    rows = all_rows(
        connection,
        "SELECT DISTINCT substr(account.owner, 6), dispute.currency FROM dispute"
        " JOIN account ON account.owner = 'bond:' || CASE WHEN opener = buyer THEN seller"
        " ELSE buyer END AND account.currency = dispute.currency"
        " WHERE owed > 0 AND balance > 0 LIMIT ?",
        (limit,),
    )
    return [(str(peer), str(currency)) for peer, currency in rows]


def set_owed(connection: Connection, dispute: str, *, owed: int, refund: int, paid: int) -> None:
    """What is still owed from the respondent's bond, and the refund in it; `paid` of the refund
    was paid now."""
    connection.execute(
        "UPDATE dispute SET owed = ?, owed_refund = ?, refunded = refunded + ? WHERE id = ?",
        (owed, refund, paid, dispute),
    )


def add_stake(connection: Connection, dispute: Dispute, nanos: int) -> Dispute:
    """The dispute holds more of the respondent's bond."""
    connection.execute(
        "UPDATE dispute SET stake = stake + ? WHERE id = ?",
        (nanos, dispute.id),
    )
    return replace(dispute, stake=dispute.stake + nanos)


def refunds_asked(connection: Connection, agreement_hash: str) -> int:
    """What of a payment the open disputes about it may give back together."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(refund_max), 0) AS BIGINT) FROM dispute"
        f" WHERE agreement_hash = ? AND {_IS_OPEN}",
        (agreement_hash,),
    )
    return int(row[0]) if row else 0


def refunded(connection: Connection, agreement_hash: str) -> int:
    """What ended disputes gave back to the buyer of an agreement."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(refunded), 0) AS BIGINT) FROM dispute WHERE agreement_hash = ?",
        (agreement_hash,),
    )
    return int(row[0]) if row else 0


def refunded_orders(connection: Connection, agreement_hash: str) -> tuple[int, ...]:
    """The orders of an agreement whose results were found wrong."""
    rows = all_rows(
        connection,
        "SELECT DISTINCT order_n FROM dispute WHERE agreement_hash = ?"
        " AND claim = 'wrong_result' AND fault = 'seller' ORDER BY order_n LIMIT ?",
        (agreement_hash, REFUNDED_ORDERS_MAX),
    )
    return tuple(int(row[0]) for row in rows)


def insert(connection: Connection, dispute: Dispute, *, evidence: str) -> Dispute:
    """Add an opened dispute with its first event; the row with its number."""
    row = first(connection, "SELECT coalesce(max(number), 0) + 1 FROM dispute")
    numbered = replace(dispute, number=int(row[0]) if row else 1)
    marks = ", ".join("?" * len(_COLUMNS))
    connection.execute(
        f"INSERT INTO dispute ({', '.join(_COLUMNS)}) VALUES ({marks})",
        tuple(getattr(numbered, name) for name in _COLUMNS),
    )
    _note(connection, dispute.id, 0, "open", "", dispute.state, evidence, dispute.opened_at)
    return numbered


def advance(
    connection: Connection, dispute: Dispute, fact: str, *, evidence: str, now: int, **values: Any
) -> Dispute:
    """Take one fact as the table says, and set these columns with it; the dispute after it.

    Raises ViolationError for a fact that the table refuses.
    """
    machine = Machine(DISPUTE, dispute.state)
    machine.take(fact)
    after = replace(dispute, state=machine.state, version=dispute.version + 1, **values)
    sets = ", ".join(f"{name} = ?" for name in ("state", "version", *values))
    changed = connection.execute(
        f"UPDATE dispute SET {sets} WHERE id = ? AND version = ?",
        (after.state, after.version, *values.values(), dispute.id, dispute.version),
    )
    assert changed.rowcount == 1, "the one writer saw another version"
    _note(connection, dispute.id, after.version, fact, dispute.state, after.state, evidence, now)
    return after


def save_split(connection: Connection, dispute: Dispute, copy: bytes, *, buyer: bool) -> Dispute:
    """Keep one side's signed split; a later one takes the place of an earlier."""
    name = "split_by_buyer" if buyer else "split_by_seller"
    connection.execute(
        f"UPDATE dispute SET {name} = ? WHERE id = ?",
        (copy, dispute.id),
    )
    return (
        replace(dispute, split_by_buyer=copy) if buyer else replace(dispute, split_by_seller=copy)
    )


def extend_open(connection: Connection, *, seconds: int) -> None:
    """Move every open deadline by some downtime."""
    connection.execute(
        "UPDATE dispute SET evidence_until = evidence_until + ?1,"
        f" check_until = check_until + ?1 WHERE {_IS_OPEN}",
        (seconds,),
    )


def add_bundle(connection: Connection, dispute: str, bundle: Bundle, *, now: int) -> None:
    """Keep a bundle of evidence."""
    connection.execute(
        "INSERT INTO dispute_bundle (dispute, n, party, done, hash, envelope, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            dispute,
            bundle.n,
            bundle.party,
            int(bundle.done),
            bundle.hash,
            bundle.envelope,
            now,
        ),
    )


def shown(connection: Connection, dispute: Dispute) -> list[Entry]:
    """What was shown, by its hash: the opening first; at most 17."""
    rows = all_rows(
        connection,
        "SELECT n, party, done, hash FROM dispute_bundle WHERE dispute = ? ORDER BY n",
        (dispute.id,),
    )
    opening = Entry(0, dispute.opener, done=False, hash=dispute.opened)
    return [opening, *(Entry(int(n), str(by), bool(done), str(name)) for n, by, done, name in rows)]


def bundles(connection: Connection, dispute: Dispute) -> list[Bundle]:
    """As `shown`, with the documents."""
    rows = all_rows(
        connection,
        "SELECT n, party, done, hash, envelope FROM dispute_bundle WHERE dispute = ? ORDER BY n",
        (dispute.id,),
    )
    found = first(connection, "SELECT envelope FROM logged WHERE hash = ?", (dispute.opened,))
    assert found is not None, "the opening is in the log"
    return [
        Bundle(0, dispute.opener, done=False, hash=dispute.opened, envelope=bytes(found[0])),
        *(
            Bundle(int(n), str(party), bool(done), str(name), bytes(data))
            for n, party, done, name, data in rows
        ),
    ]


def add_list(connection: Connection, dispute: str, *, round_: int, document: str) -> None:
    """Keep the hash of a logged list of candidates."""
    connection.execute(
        "INSERT INTO dispute_list (dispute, round, hash) VALUES (?, ?, ?)",
        (dispute, round_, document),
    )


def list_of(connection: Connection, dispute: str, *, round_: int) -> str | None:
    """The hash of the list that a round's draws are made from."""
    row = first(
        connection,
        "SELECT hash FROM dispute_list WHERE dispute = ? AND round = ?",
        (dispute, round_),
    )
    return str(row[0]) if row else None


def add_draw(
    connection: Connection, dispute: str, *, round_: int, checker: str, envelope: bytes
) -> None:
    """Keep a draw."""
    connection.execute(
        "INSERT INTO dispute_draw (dispute, round, checker, envelope) VALUES (?, ?, ?, ?)",
        (dispute, round_, checker, envelope),
    )


def draws(connection: Connection, dispute: str) -> list[tuple[str, bytes]]:
    """(checker, signed draw) of every round, in order; at most CHECKERS_MAX."""
    rows = all_rows(
        connection,
        "SELECT checker, envelope FROM dispute_draw WHERE dispute = ? ORDER BY round",
        (dispute,),
    )
    return [(str(checker), bytes(data)) for checker, data in rows]


def events(connection: Connection, dispute: str) -> list[dict[str, Any]]:
    """The dispute's history."""
    rows = all_rows(
        connection,
        "SELECT n, fact, after, evidence, at FROM dispute_event WHERE dispute = ?"
        " ORDER BY n LIMIT ?",
        (dispute, _EVENTS_SHOWN_MAX),
    )
    names = ("n", "fact", "state", "evidence", "at")
    return [dict(zip(names, row, strict=True)) for row in rows]


def sellers_with_bond(
    connection: Connection,
    *,
    parties: tuple[str, str],
    currency: str,
    drawn: Sequence[str],
    now: int,
) -> list[Candidate]:
    """The candidates of a draw: registered sellers with a bond, the largest first, that are no
    party, belong to no party's owner, and were not drawn before."""
    marks = ", ".join("?" * len(drawn)) or "''"
    rows = all_rows(
        connection,
        "SELECT peer, balance FROM account JOIN peer ON peer = substr(account.owner, 6)"
        " WHERE kind = 'bond' AND currency = ? AND balance > 0"
        " AND seller = 1 AND expires_at > ? AND revoked_at = 0"
        f" AND peer NOT IN (?, ?) AND peer NOT IN ({marks}) AND coalesce(peer.owner, '') NOT IN"
        " (SELECT owner FROM peer WHERE peer IN (?, ?) AND owner IS NOT NULL)"
        " ORDER BY balance DESC, peer LIMIT ?",
        (currency, now, *parties, *drawn, *parties, CHECKER_CANDIDATES_MAX),
    )
    return [
        Candidate(peer=peer, weight_nanos=min(int(balance), CHECKER_WEIGHT_NANOS_MAX))
        for peer, balance in rows
    ]


def settled_at(connection: Connection, agreement_hash: str) -> int:
    """When the escrow last moved: for a final one, when it came to rest."""
    row = first(
        connection,
        "SELECT coalesce(max(at), 0) FROM escrow_event WHERE agreement_hash = ?",
        (agreement_hash,),
    )
    return int(row[0]) if row else 0


def downtime_since(connection: Connection, at: int) -> int:
    """Seconds that the coordinator was away since then."""
    row = first(
        connection,
        "SELECT coalesce(sum(until - CASE WHEN since > ?1 THEN since ELSE ?1 END), 0)"
        " FROM downtime WHERE until > ?1",
        (at,),
    )
    return int(row[0]) if row else 0


def checkpoint_over(connection: Connection, envelope_hash: str) -> tuple[int, str] | None:
    """(size, note) of the first signed head that holds a logged document; None before it is."""
    row = first(
        connection,
        "SELECT size, note FROM checkpoint WHERE size >"
        " (SELECT leaf FROM logged WHERE hash = ?) ORDER BY size LIMIT 1",
        (envelope_hash,),
    )
    return (int(row[0]), str(row[1])) if row else None


def _note(
    connection: Connection,
    dispute: str,
    n: int,
    fact: str,
    before: str,
    after: str,
    evidence: str,
    at: int,
) -> None:
    connection.execute(
        "INSERT INTO dispute_event (dispute, n, fact, before, after, evidence, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (dispute, n, fact, before, after, evidence, at),
    )
