"""What a node must still know after a power cut: its sessions' money and its advert's number.

One connection, one writer at a time, in a worker thread. WAL with synchronous=NORMAL survives the
death of the process; a power cut may lose the last vouchers, which costs at most one exposure.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils
import trio
from sqlite_utils.migrations import Migrations

from lumaris_protocol.agreements import Contract
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.settlement import Papers

T = TypeVar("T")

migrations = Migrations("lumaris_node")

# Agreements whose grant never came are forgotten after this long, and the oldest settled sessions
# beyond this many: their sums stay, and the coordinator keeps their receipts.
_UNGRANTED_S = 3600
_SETTLED_MAX = 10_000

# A session that never got its grant has nothing to settle.
_ENDED = "CASE WHEN \"grant\" IS NULL THEN 'settled' ELSE 'ended' END"


@migrations()
def create_sessions(db: sqlite_utils.Database) -> None:
    """One row for each agreement; `state` is agreed, open, ended or settled."""
    db.table("session").create(
        {
            "session": str,
            "buyer": str,
            "by_buyer": bytes,
            "by_seller": bytes,
            "grant": bytes,
            "voucher": bytes,
            "total_nanos": int,
            "close_buyer": bytes,
            "close_seller": bytes,
            "orders_done": int,
            "state": str,
            "reason": str,
            "started_at": int,
            "ended_at": int,
            "earned_nanos": int,
            "receipt": bytes,
        },
        pk="session",
        not_null={"session", "buyer", "by_buyer", "by_seller", "state", "started_at"},
        defaults={"total_nanos": 0, "orders_done": 0, "earned_nanos": 0, "reason": ""},
    )
    db.table("session").create_index(["state"])
    db.table("counter").create({"name": str, "value": int}, pk="name")


# The totals of settled sessions that were forgotten.
_PRUNED = ("pruned_sessions", "pruned_orders", "pruned_nanos")


class Store:
    """The node's database."""

    def __init__(self, path: Path) -> None:
        self.evidence = path.parent / "evidence"  # what both sides signed, by session
        try:
            connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._db = sqlite_utils.Database(connection)
            migrations.apply(self._db)
        except sqlite3.Error as error:
            raise LumarisError("not_writable", f"{path}: {error}") from None
        self._connection = connection
        self._limiter = trio.CapacityLimiter(1)

    async def add_session(self, contract: Contract, *, now: float) -> None:
        """A countersigned agreement, before the buyer hears of it."""
        agreement = contract.agreement
        await self._write(
            "INSERT INTO session (session, buyer, by_buyer, by_seller, state, started_at)"
            " VALUES (?, ?, ?, ?, 'agreed', ?)",
            (agreement.session, agreement.buyer, contract.by_buyer, contract.by_seller, int(now)),
        )

    async def find_ungranted(self, session: str) -> tuple[bytes, bytes] | None:
        """The signed copies (buyer's, seller's) of an agreement whose grant never came."""
        row: tuple[bytes, bytes] | None = await self._run(
            lambda: self._connection.execute(
                'SELECT by_buyer, by_seller FROM session WHERE session = ? AND "grant" IS NULL',
                (session,),
            ).fetchone()
        )
        return row

    async def end_ungranted(self, session: str, grant: bytes, *, now: float) -> None:
        """The grant came when the session could no longer begin: it settles for nothing."""
        await self._write(
            "UPDATE session SET \"grant\" = ?, state = 'ended', reason = 'quote_expired',"
            ' ended_at = ? WHERE session = ? AND "grant" IS NULL',
            (grant, int(now), session),
        )

    async def keep_grant(self, session: str, grant: bytes) -> None:
        """The session is open."""
        await self._write(
            "UPDATE session SET \"grant\" = ?, state = 'open' WHERE session = ?", (grant, session)
        )

    async def keep_voucher(self, session: str, voucher: bytes, total_nanos: int) -> None:
        """A higher voucher."""
        await self._write(
            "UPDATE session SET voucher = ?, total_nanos = ? WHERE session = ? AND total_nanos < ?"
            " AND close_buyer IS NULL",
            (voucher, total_nanos, session, total_nanos),
        )

    async def keep_closes(
        self, session: str, by_buyer: bytes, by_seller: bytes, *, total_nanos: int
    ) -> None:
        """The co-signed end: a claim names its total, which may be less than the voucher's."""
        await self._write(
            "UPDATE session SET close_buyer = ?, close_seller = ?, total_nanos = ?"
            " WHERE session = ?",
            (by_buyer, by_seller, total_nanos, session),
        )

    async def end_session(self, session: str, reason: str, *, orders: int, now: float) -> None:
        """The session is over; one that never got a grant has nothing to settle."""
        await self._write(
            f"UPDATE session SET state = {_ENDED}, reason = ?, orders_done = ?, ended_at = ?"
            " WHERE session = ? AND state IN ('agreed', 'open')",
            (reason, orders, int(now), session),
        )

    async def recover(self, *, now: float) -> int:
        """After a start: sessions cut off by the death of the last process end here."""
        return await self._write(
            f"UPDATE session SET state = {_ENDED}, reason = 'platform_error', ended_at = ?"
            " WHERE state IN ('agreed', 'open')",
            (int(now),),
        )

    async def settled(self, session: str, *, receipt: bytes, earned_nanos: int) -> None:
        """The coordinator paid; its receipt is the proof."""
        await self._write(
            "UPDATE session SET state = 'settled', receipt = ?, earned_nanos = ? WHERE session = ?",
            (receipt, earned_nanos, session),
        )

    async def give_up(self, session: str, reason: str) -> None:
        """The coordinator refused the claim for good; the reason is kept."""
        await self._write(
            "UPDATE session SET state = 'settled', reason = ? WHERE session = ?", (reason, session)
        )

    async def unsettled(self) -> list[Papers]:
        """Every session that waits for its settlement, oldest first."""
        rows = await self._run(
            lambda: self._connection.execute(
                'SELECT session, by_buyer, by_seller, "grant", voucher, total_nanos, close_buyer,'
                " close_seller FROM session WHERE state = 'ended' ORDER BY ended_at"
            ).fetchall()
        )
        found = []
        for *fields, by_buyer, by_seller in rows:
            closes = (by_buyer, by_seller) if by_buyer and by_seller else ()
            found.append(Papers(*fields, closes=closes))
        return found

    async def prune(self, *, now: float) -> int:
        """Forget what no claim needs any more; how many rows. Totals of the status keep theirs."""
        surplus = (
            "SELECT session FROM session WHERE state = 'settled'"
            f" ORDER BY ended_at DESC, session LIMIT -1 OFFSET {_SETTLED_MAX}"
        )

        def work() -> int:
            execute = self._connection.execute
            execute("BEGIN IMMEDIATE")
            try:
                gone = execute(
                    'DELETE FROM session WHERE "grant" IS NULL AND started_at < ?'
                    " AND state IN ('agreed', 'settled')",
                    (int(now) - _UNGRANTED_S,),
                ).rowcount
                sums = execute(
                    "SELECT COUNT(*), COALESCE(SUM(orders_done), 0), COALESCE(SUM(earned_nanos), 0)"
                    f" FROM session WHERE session IN ({surplus})"
                ).fetchone()
                for name, value in zip(_PRUNED, sums, strict=True):
                    execute(
                        "INSERT INTO counter (name, value) VALUES (?, ?)"
                        " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                        (name, value),
                    )
                gone += execute(f"DELETE FROM session WHERE session IN ({surplus})").rowcount
                execute("COMMIT")
            except BaseException:
                execute("ROLLBACK")
                raise
            return gone

        return await self._run(work)

    async def next_advert_seq(self, *, now: float) -> int:
        """A number above every one used before, even by a copy of this store: seconds then +1."""

        def bump() -> int:
            row = self._connection.execute(
                "SELECT value FROM counter WHERE name = 'advert'"
            ).fetchone()
            value = max(int(now), row[0] + 1 if row else 0)
            self._connection.execute(
                "INSERT INTO counter (name, value) VALUES ('advert', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (value,),
            )
            return value

        return await self._run(bump)

    async def summary(self) -> dict[str, int]:
        """Sessions by state, orders done and nanos earned, for the status."""

        def read() -> dict[str, int]:
            counts = dict(
                self._connection.execute("SELECT state, COUNT(*) FROM session GROUP BY state")
            )
            orders, earned, pending = self._connection.execute(
                "SELECT COALESCE(SUM(orders_done), 0), COALESCE(SUM(earned_nanos), 0),"
                " COALESCE(SUM(CASE WHEN state != 'settled' THEN total_nanos ELSE 0 END), 0)"
                " FROM session"
            ).fetchone()
            pruned = dict(self._connection.execute("SELECT name, value FROM counter"))
            forgotten, more_orders, more_nanos = (pruned.get(name, 0) for name in _PRUNED)
            if forgotten:
                counts["settled"] = counts.get("settled", 0) + forgotten
            orders, earned = orders + more_orders, earned + more_nanos
            totals = {"orders_done": orders, "earned_nanos": earned, "pending_nanos": pending}
            return {f"sessions_{state}": count for state, count in counts.items()} | totals

        return await self._run(read)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    async def _write(self, sql: str, values: tuple[Any, ...]) -> int:
        return await self._run(lambda: self._connection.execute(sql, values).rowcount)

    async def _run(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)
