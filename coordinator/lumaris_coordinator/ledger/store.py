"""Accounts and transfers. Runs inside the writer's savepoint: it all holds or none of it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.errors import LumarisError

FEES: Final = "fees"
TEST_CREDIT: Final = "external:test-credit"


@dataclass(frozen=True)
class Leg:
    """Money goes from the account `debit` to the account `credit`."""

    debit: str
    credit: str
    amount_nanos: int


def wallet(owner: str, currency: str) -> str:
    """The account that an owner has in a currency."""
    return f"{owner}:{currency}"


def open_account(
    connection: Connection, *, owner: str, kind: str, currency: str, may_negative: bool = False
) -> str:
    """Make an owner's account of a currency, with nothing in it; its id. Repeating it changes
    nothing."""
    account = wallet(owner, currency)
    connection.execute(
        "INSERT INTO account (id, owner, kind, currency, may_negative) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO NOTHING",
        (account, owner, kind, currency, int(may_negative)),
    )
    return account


def open_wallet(connection: Connection, owner: str, currency: str) -> str:
    """The account of a peer's or user's money in a currency, made when there is none yet."""
    kind = "user" if owner.startswith("usr_") else "peer"
    return open_account(connection, owner=owner, kind=kind, currency=currency)


def move(connection: Connection, *, kind: str, ref: str, legs: Iterable[Leg], now: int) -> int:
    """Record a transaction of some legs and apply it; its number. Legs of nothing are left out.

    An account changes once, by what all legs together give or take. Raises LumarisError `no_funds`
    when an account that may not be negative would be, and ValueError for a leg between two
    currencies: nothing here changes one into the other.
    """
    moved = [leg for leg in legs if leg.amount_nanos]
    changes: dict[str, int] = {}
    for leg in moved:
        if leg.amount_nanos < 0 or currency_of(leg.debit) != currency_of(leg.credit):
            raise ValueError(f"no leg of a transaction: {leg}")
        changes[leg.debit] = changes.get(leg.debit, 0) - leg.amount_nanos
        changes[leg.credit] = changes.get(leg.credit, 0) + leg.amount_nanos
    row = first(
        connection,
        "INSERT INTO txn (id, kind, ref, at)"
        " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM txn), ?, ?, ?) RETURNING id",
        (kind, ref, now),
    )
    assert row is not None
    txn = int(row[0])
    if moved:
        _record(connection, txn, moved)
        _apply(connection, changes)
    return txn


def _record(connection: Connection, txn: int, legs: list[Leg]) -> None:
    """Add the transfers in one statement, which sees the table as it was before."""
    one = "((SELECT coalesce(max(id), 0) + {} FROM transfer), ?, ?, ?, ?, ?)"
    rows = ", ".join(one.format(place + 1) for place in range(len(legs)))
    values: list[object] = []
    for leg in legs:
        values += (txn, leg.debit, leg.credit, currency_of(leg.debit), leg.amount_nanos)
    connection.execute(
        f"INSERT INTO transfer (id, txn, debit, credit, currency, amount) VALUES {rows}",
        values,
    )


def _apply(connection: Connection, changes: Mapping[str, int]) -> None:
    """Change the balances: what is taken each by itself, since it may not be there; what is given
    in one statement. The transfers' references say that the accounts exist."""
    given: list[object] = []
    for account, change in changes.items():
        if change > 0:
            given += (account, change)
        elif change < 0:
            taken = connection.execute(
                "UPDATE account SET balance = balance - ?1"
                " WHERE id = ?2 AND (balance >= ?1 OR may_negative = 1)",
                (-change, account),
            )
            if taken.rowcount != 1:
                raise LumarisError("no_funds")
    places = range(1, len(given), 2)
    cases = " ".join(f"WHEN ?{place} THEN CAST(?{place + 1} AS BIGINT)" for place in places)
    names = ", ".join(f"?{place}" for place in places)
    if given:
        connection.execute(
            f"UPDATE account SET balance = balance + CASE id {cases} END WHERE id IN ({names})",
            given,
        )


def currency_of(account: str) -> str:
    """The currency of an account, which its id ends with."""
    return account.rpartition(":")[2]


def balance(connection: Connection, account: str) -> int:
    """An account's balance in nanos; 0 for one that does not exist."""
    row = first(connection, "SELECT balance FROM account WHERE id = ?", (account,))
    return int(row[0]) if row else 0


def currencies_of(connection: Connection, owner: str) -> list[str]:
    """The currencies that an owner has an account in: at most those of the settings over time."""
    rows = all_rows(
        connection, "SELECT currency FROM account WHERE owner = ? ORDER BY currency", (owner,)
    )
    return [str(row[0]) for row in rows]


def credit_given(connection: Connection, account: str) -> tuple[int, int]:
    """(nanos, number) of the test credits that an account was ever given."""
    row = first(connection, "SELECT credited, credits FROM account WHERE id = ?", (account,))
    return (int(row[0]), int(row[1])) if row else (0, 0)


def give_credit(
    connection: Connection, account: str, *, nonce: str, amount_nanos: int, now: int
) -> int:
    """Credit an account under a nonce that is new to it; the transaction's number."""
    legs = [Leg(wallet(TEST_CREDIT, currency_of(account)), account, amount_nanos)]
    txn = move(connection, kind="test_credit", ref=nonce, legs=legs, now=now)
    connection.execute(
        "INSERT INTO credit (account, nonce, amount, txn) VALUES (?, ?, ?, ?)",
        (account, nonce, amount_nanos, txn),
    )
    connection.execute(
        "UPDATE account SET credited = credited + ?, credits = credits + 1 WHERE id = ?",
        (amount_nanos, account),
    )
    return txn


def transfers(
    connection: Connection, account: str, *, after: int, limit: int
) -> list[dict[str, Any]]:
    """An account's transfers with a number above `after`, oldest first."""
    rows = all_rows(
        connection,
        "SELECT transfer.id, txn, kind, ref, at, debit, amount FROM transfer"
        " JOIN txn ON txn.id = transfer.txn"
        " WHERE transfer.id > ?2 AND (debit = ?1 OR credit = ?1) ORDER BY transfer.id LIMIT ?3",
        (account, after, limit),
    )
    return [
        {
            "transfer": number,
            "transaction": txn,
            "kind": kind,
            "ref": ref,
            "at": at,
            "amount_nanos": -amount if debit == account else amount,
        }
        for number, txn, kind, ref, at, debit, amount in rows
    ]


def last_transfer(connection: Connection) -> int:
    """The number of the newest transfer, 0 when there is none."""
    row = first(connection, "SELECT coalesce(max(id), 0) FROM transfer")
    return int(row[0]) if row else 0


def audit(connection: Connection) -> dict[str, Any]:
    """Recompute every balance from the transfers and compare. In one snapshot.

    `sums_nanos` are the sums of all balances by currency, each 0 because money only ever moves;
    `sum_nanos` is the one farthest from it.
    """
    rows = all_rows(
        connection,
        "SELECT currency, balance, coalesce(moved.net, 0) FROM account LEFT JOIN ("
        " SELECT id, sum(net) AS net FROM ("
        "  SELECT credit AS id, amount AS net FROM transfer"
        "  UNION ALL SELECT debit, -amount FROM transfer) AS leg GROUP BY id"
        ") AS moved ON moved.id = account.id",
    )
    counted = first(connection, "SELECT count(*), coalesce(max(id), 0) FROM transfer")
    stuck = first(
        connection,
        "SELECT count(*) FROM escrow JOIN account ON account.id = escrow.account"
        " WHERE balance <> CASE WHEN state IN ('held', 'claimed', 'disputed')"
        " THEN cap - paid - returned ELSE 0 END",
    )
    assert counted is not None
    assert stuck is not None
    mismatches = sum(1 for _, stored, replayed in rows if stored != replayed)
    sums: dict[str, int] = {}
    for currency, stored, _ in rows:
        sums[currency] = sums.get(currency, 0) + stored
    return {
        "balanced": mismatches == 0 and not any(sums.values()) and stuck[0] == 0,
        "accounts": len(rows),
        "transfers": counted[0],
        "last_transfer": counted[1],
        "sum_nanos": max(sums.values(), key=abs, default=0),
        "sums_nanos": sums,
        "mismatches": mismatches,
        "escrow_mismatches": stuck[0],
    }
