"""Accounts and transfers. Runs inside the writer's savepoint: it all holds or none of it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from lumaris_coordinator.store.sqlite import Connection, all_rows, first
from lumaris_protocol.errors import LumarisError

FEES: Final = "fees"
TEST_CREDIT: Final = "external:test-credit"


@dataclass(frozen=True)
class Leg:
    """Money goes from the account `debit` to the account `credit`."""

    debit: str
    credit: str
    amount_nanos: int


def open_account(
    connection: Connection, account: str, *, kind: str, currency: str, may_negative: bool = False
) -> None:
    """Make an account with nothing in it. Repeating it changes nothing."""
    connection.execute(
        "INSERT INTO account (id, kind, currency, may_negative) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (id) DO NOTHING",
        (account, kind, currency, int(may_negative)),
    )


def move(connection: Connection, *, kind: str, ref: str, legs: Iterable[Leg], now: int) -> int:
    """Record a transaction of some legs and apply it; its number. Legs of nothing are left out.

    Raises LumarisError `no_funds` when an account that may not be negative would be.
    """
    cursor = connection.execute(
        "INSERT INTO txn (kind, ref, at) VALUES (?, ?, ?)", (kind, ref, now)
    )
    txn = int(cursor.lastrowid or 0)
    for leg in legs:
        if leg.amount_nanos == 0:
            continue
        connection.execute(
            "INSERT INTO transfer (txn, debit, credit, amount) VALUES (?, ?, ?, ?)",
            (txn, leg.debit, leg.credit, leg.amount_nanos),
        )
        taken = connection.execute(
            "UPDATE account SET balance = balance - ?1"
            " WHERE id = ?2 AND (balance >= ?1 OR may_negative)",
            (leg.amount_nanos, leg.debit),
        )
        if taken.rowcount != 1:
            raise LumarisError("no_funds")
        connection.execute(
            "UPDATE account SET balance = balance + ? WHERE id = ?", (leg.amount_nanos, leg.credit)
        )
    return txn


def balance(connection: Connection, account: str) -> int:
    """An account's balance in nanos; 0 for one that does not exist."""
    row = first(connection, "SELECT balance FROM account WHERE id = ?", (account,))
    return int(row[0]) if row else 0


def credit_given(connection: Connection, account: str) -> tuple[int, int]:
    """(nanos, number) of the test credits that an account was ever given."""
    row = first(connection, "SELECT credited, credits FROM account WHERE id = ?", (account,))
    return (int(row[0]), int(row[1])) if row else (0, 0)


def give_credit(
    connection: Connection, account: str, *, nonce: str, amount_nanos: int, now: int
) -> int:
    """Credit an account under a nonce that is new to it; the transaction's number."""
    legs = [Leg(TEST_CREDIT, account, amount_nanos)]
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
    """Recompute every balance from the transfers and compare. One snapshot, one pass.

    `sum_nanos` is the sum of all balances, which is 0 because money only ever moves.
    """
    connection.execute("BEGIN")
    try:
        rows = all_rows(
            connection,
            "SELECT account.id, balance, coalesce(moved.net, 0) FROM account LEFT JOIN ("
            " SELECT id, sum(net) AS net FROM ("
            "  SELECT credit AS id, amount AS net FROM transfer"
            "  UNION ALL SELECT debit, -amount FROM transfer) GROUP BY id"
            ") AS moved ON moved.id = account.id",
        )
        counted = first(connection, "SELECT count(*), coalesce(max(id), 0) FROM transfer")
        stuck = first(
            connection,
            "SELECT count(*) FROM escrow JOIN account ON account.id = escrow.account"
            " WHERE balance <> CASE WHEN state IN ('held', 'claimed') THEN cap ELSE 0 END",
        )
    finally:
        connection.execute("COMMIT")
    assert counted is not None
    assert stuck is not None
    mismatches = sum(1 for _, stored, replayed in rows if stored != replayed)
    total = sum(stored for _, stored, _ in rows)
    return {
        "balanced": mismatches == 0 and total == 0 and stuck[0] == 0,
        "accounts": len(rows),
        "transfers": counted[0],
        "last_transfer": counted[1],
        "sum_nanos": total,
        "mismatches": mismatches,
        "escrow_mismatches": stuck[0],
    }
