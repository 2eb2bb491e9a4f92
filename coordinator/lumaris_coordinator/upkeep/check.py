"""Everything the books say, held against everything else they say. From one snapshot.

Each finding is a sentence that names what is wrong; a store without findings is sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lumaris_coordinator.bounds import CHECK_FINDINGS_MAX
from lumaris_coordinator.ledger import store as ledger
from lumaris_coordinator.money import reconciliation
from lumaris_coordinator.receipts import audit as log_audit
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.store.port import Connection, all_rows, first

# Tables whose numbers have no gaps, because the statement that adds a row makes its number; events
# are forgotten from the oldest on.
_NUMBERED: Final = {
    "txn": "id",
    "transfer": "id",
    "event": "id",
    "downtime": "id",
    "reconciliation": "id",
    "bond_release": "id",
    "escrow": "number",
    "dispute": "number",
    "payout": "number",
}
# The histories: one row for every move, and as many moves as the version says.
_HISTORIES: Final = (
    ("escrow", "agreement_hash", "escrow_event", "agreement_hash"),
    ("dispute", "id", "dispute_event", "dispute"),
)
# Each query names rows that must not exist, by one column.
_NEVER: Final = {
    "account {} of an escrow belongs to none": (
        "SELECT id FROM account WHERE kind = 'escrow'"
        " AND NOT EXISTS (SELECT 1 FROM escrow WHERE escrow.account = account.id)"
        " AND NOT EXISTS (SELECT 1 FROM payout WHERE payout.held_in = account.id)"
    ),
    "the account of escrow {} does not hold what is left of it": (
        "SELECT agreement_hash FROM escrow JOIN account ON account.id = escrow.account"
        " WHERE balance <> CASE WHEN state IN ('held', 'claimed', 'disputed')"
        " THEN cap - paid - returned ELSE 0 END"
    ),
    "payout {} does not hold what it pays": (
        "SELECT payout.id FROM payout JOIN account ON account.id = payout.held_in"
        " WHERE balance NOT IN (0, amount)"
        " OR (state IN ('paid', 'returned') AND balance <> 0)"
    ),
    "account {} of a dispute belongs to none": (
        "SELECT id FROM account WHERE kind = 'dispute' AND NOT EXISTS"
        " (SELECT 1 FROM dispute WHERE account.owner = 'dispute:' || dispute.id)"
    ),
    "dispute {} has ended and still holds money": (
        "SELECT dispute.id FROM dispute"
        " JOIN account ON account.owner = 'dispute:' || dispute.id"
        " WHERE ended_at IS NOT NULL AND balance <> 0"
    ),
    "dispute {} is owed something without a ruling": (
        "SELECT id FROM dispute WHERE owed > 0 AND state <> 'settled'"
    ),
    "the opening of dispute {} is not in the log": (
        "SELECT id FROM dispute WHERE NOT EXISTS"
        " (SELECT 1 FROM logged WHERE logged.hash = dispute.opened)"
    ),
    "a list of dispute {} is not in the log": (
        "SELECT dispute FROM dispute_list WHERE NOT EXISTS"
        " (SELECT 1 FROM logged WHERE logged.hash = dispute_list.hash)"
    ),
    "account {} of a bond belongs to no peer": (
        "SELECT id FROM account WHERE kind = 'bond' AND NOT EXISTS"
        " (SELECT 1 FROM peer WHERE account.owner = 'bond:' || peer.peer)"
    ),
    "account {} of a peer belongs to none": (
        "SELECT id FROM account WHERE kind = 'peer' AND NOT EXISTS"
        " (SELECT 1 FROM peer WHERE peer.account = account.owner)"
    ),
    "account {} is below zero": (
        "SELECT id FROM account WHERE balance < 0 AND (may_negative = 0 OR kind <> 'external')"
    ),
    "the end of escrow {} has no receipt": (
        "SELECT agreement_hash FROM escrow WHERE state IN ('settled', 'expired') AND NOT EXISTS"
        " (SELECT 1 FROM receipt WHERE receipt.agreement_hash = escrow.agreement_hash)"
    ),
    "receipt {} is of an escrow that has not ended": (
        "SELECT receipt.id FROM receipt JOIN escrow USING (agreement_hash)"
        " WHERE state NOT IN ('settled', 'expired')"
    ),
    "leaf {} of the log is missing": (
        "SELECT leaf + 1 FROM leaf WHERE leaf + 1 < (SELECT count(*) FROM leaf) AND NOT EXISTS"
        " (SELECT 1 FROM leaf AS next WHERE next.leaf = leaf.leaf + 1)"
    ),
}


@dataclass(frozen=True)
class Report:
    """What was looked at and what is wrong; `problems` has an end, so there may be more."""

    accounts: int
    transfers: int
    escrows: int
    log_size: int
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(connection: Connection, log: ReceiptLog) -> Report:
    """Look at everything. Takes some seconds for a million transfers or receipts."""
    problems: list[str] = []
    for problem in _problems(connection, log):
        problems.append(problem)
        if len(problems) >= CHECK_FINDINGS_MAX:
            break
    return Report(
        accounts=_count(connection, "account"),
        transfers=_count(connection, "transfer"),
        escrows=_count(connection, "escrow"),
        log_size=log.head(connection).size,
        problems=tuple(problems),
    )


def _problems(connection: Connection, log: ReceiptLog) -> Iterator[str]:
    yield from _ledger(connection)
    for text, sql in _NEVER.items():
        for (name,) in all_rows(connection, f"{sql} LIMIT {CHECK_FINDINGS_MAX}"):
            yield text.format(name)
    yield from _gaps(connection)
    yield from reconciliation.check(connection)
    for problem in log_audit.audit(connection, log):
        yield f"the receipts log: {problem}"


def _ledger(connection: Connection) -> Iterator[str]:
    """Every balance again, from the transfers."""
    found = ledger.audit(connection)
    if found["mismatches"]:
        yield f"{found['mismatches']} accounts do not have what their transfers add up to"
    for currency, nanos in found["sums_nanos"].items():
        if nanos:
            yield f"all accounts in {currency} add up to {nanos} nanos instead of 0"


def _gaps(connection: Connection) -> Iterator[str]:
    for table, column in _NUMBERED.items():
        begins = f"min({column})" if table == "event" else "1"
        # The names are the constants above.
        sql = f"SELECT count(*), coalesce(max({column}), 0), coalesce({begins}, 1) FROM {table}"  # noqa: S608
        row = first(connection, sql)
        if row is not None and row[0] != row[1] - row[2] + 1:
            yield f"table {table} has {row[0]} rows and numbers up to {row[1]}"
    for table, key, history, parent in _HISTORIES:
        sql = (
            f"SELECT {key} FROM {table} WHERE version + 1 <>"  # noqa: S608
            f" (SELECT count(*) FROM {history} WHERE {history}.{parent} = {table}.{key})"
            f" LIMIT {CHECK_FINDINGS_MAX}"
        )
        for (name,) in all_rows(connection, sql):
            yield f"the history of {table} {name} is not whole"


def _count(connection: Connection, table: str) -> int:
    row = first(connection, f"SELECT count(*) FROM {table}")  # noqa: S608 - a constant
    return int(row[0]) if row else 0
