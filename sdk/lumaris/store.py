"""What a buyer must still know after a crash: its sessions' money, and its jobs and receipts.

A session's row is written before the other side hears of the step it records. Job rows are for
people; they are written behind, in batches.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlite_utils
import trio
from sqlite_utils.migrations import Migrations

from lumaris import processes
from lumaris_protocol.agreements import Contract
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.settlement import Papers

T = TypeVar("T")

migrations = Migrations("lumaris")

JOB_COLUMNS: Final = (
    "job",
    "session",
    "seller",
    "image",
    "command",
    "state",
    "reason",
    "detail",
    "exit_status",
    "cost_nanos",
    "wall_ms",
    "cpu_ms",
    "fuel",
    "memory_peak_bytes",
    "attempts",
    "n",
    "owner",
    "created_at",
    "ended_at",
)


# Nobody took the wish for so long: its job has ended, or its program is gone.
_CANCEL_KEPT_S: Final = 600

# What a session's vouchers say beyond the costs of its other jobs: what the job at hand cost.
_REST: Final = (
    "MAX(0, IFNULL((SELECT total_nanos FROM session WHERE session.session = job.session), 0)"
    " - IFNULL((SELECT SUM(cost_nanos) FROM job AS other WHERE other.session = job.session"
    " AND other.job != job.job), 0))"
)

# What people see of a job; its owner is our own book-keeping.
_SHOWN: Final = ", ".join(name for name in JOB_COLUMNS if name != "owner")


@migrations()
def create_tables(db: sqlite_utils.Database) -> None:
    """Sessions (agreed, open, ended, claimed, settled) and jobs."""
    db.table("session").create(
        {
            "session": str,
            "seller": str,
            "by_buyer": bytes,
            "by_seller": bytes,
            "grant": bytes,
            "opening": bytes,
            "voucher": bytes,
            "total_nanos": int,
            "close_buyer": bytes,
            "close_seller": bytes,
            "state": str,
            "reason": str,
            "started_at": int,
            "owner": str,
            "receipt_id": str,
            "receipt": bytes,
        },
        pk="session",
        not_null={"session", "seller", "by_buyer", "by_seller", "state", "started_at"},
        defaults={"total_nanos": 0, "reason": ""},
    )
    db.table("session").create_index(["state"])
    db.table("session").create_index(["receipt_id"])
    added = ("memory_peak_bytes", "n")  # by a later migration
    names = [name for name in JOB_COLUMNS if name not in added]
    kinds: dict[str, type] = dict.fromkeys(names, str)
    numbers = ("exit_status", "cost_nanos", "wall_ms", "cpu_ms", "fuel", "attempts")
    kinds |= dict.fromkeys((*numbers, "created_at", "ended_at"), int)
    db.table("job").create(kinds, pk="job")
    db.table("job").create_index(["created_at"])


@migrations()
def add_live(db: sqlite_utils.Database) -> None:
    """Where a job runs, what it consumes, and whether somebody wants it cancelled."""
    db.table("job").add_column("memory_peak_bytes", int)
    db.table("job").add_column("n", int)
    db.table("cancel").create({"job": str, "grace_s": int, "asked_at": int}, pk="job")


@dataclass(frozen=True)
class Unsettled:
    """A session whose money has not come to rest."""

    papers: Papers
    seller: str
    opening: bytes | None  # our signed first word to the seller
    state: str


class Store:
    """The buyer's database."""

    def __init__(self, path: Path) -> None:
        self.evidence = path.parent / "evidence"  # what both sides signed, by session
        try:
            connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            connection.execute("PRAGMA busy_timeout=5000")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._db = sqlite_utils.Database(connection)
            migrations.apply(self._db)
        except sqlite3.Error as error:
            raise LumarisError("not_writable", f"{path}: {error}") from None
        self._connection = connection
        self._limiter = trio.CapacityLimiter(1)
        self._owner = processes.this_process()

    # --- sessions ---

    async def add_session(self, contract: Contract, *, now: float) -> None:
        """An agreement, before its grant is asked for."""
        agreement = contract.agreement
        await self._write(
            "INSERT INTO session (session, seller, by_buyer, by_seller, state, started_at, owner)"
            " VALUES (?, ?, ?, ?, 'agreed', ?, ?)",
            (
                agreement.session,
                agreement.seller,
                contract.by_buyer,
                contract.by_seller,
                int(now),
                self._owner,
            ),
        )

    async def keep_grant(self, session: str, grant: bytes, opening: bytes) -> None:
        """The money is held; `opening` is the signed first word to the seller."""
        await self._write(
            "UPDATE session SET \"grant\" = ?, opening = ?, state = 'open' WHERE session = ?",
            (grant, opening, session),
        )

    async def keep_voucher(self, session: str, voucher: bytes, total_nanos: int) -> None:
        """A higher voucher, before it is sent."""
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

    async def set_state(self, session: str, state: str, reason: str = "") -> None:
        """Move a session on."""
        await self._write(
            "UPDATE session SET state = ?, reason = ? WHERE session = ? AND state != 'settled'",
            (state, reason, session),
        )

    async def keep_receipt(self, session: str, receipt_id: str, receipt: bytes) -> None:
        """The end of a session's money."""
        await self._write(
            "UPDATE session SET state = 'settled', receipt_id = ?, receipt = ? WHERE session = ?",
            (receipt_id, receipt, session),
        )

    async def unsettled(self) -> list[Unsettled]:
        """Sessions that are not settled, oldest first; not those another live program runs."""
        rows = await self._run(
            lambda: self._connection.execute(
                'SELECT session, by_buyer, by_seller, "grant", voucher, total_nanos, close_buyer,'
                " close_seller, seller, opening, state, owner FROM session"
                " WHERE state != 'settled' ORDER BY started_at"
            ).fetchall()
        )
        found = []
        for *held, close_buyer, close_seller, seller, opening, state, owner in rows:
            if state in ("agreed", "open") and owner != self._owner and processes.alive(owner):
                continue
            closes = (close_buyer, close_seller) if close_buyer and close_seller else ()
            found.append(Unsettled(Papers(*held, closes=closes), seller, opening, state))
        return found

    async def receipt(self, name: str) -> bytes | None:
        """A receipt file by the id of the receipt, the session or a job of it."""

        def read() -> bytes | None:
            row = self._connection.execute(
                "SELECT receipt FROM session WHERE receipt_id = ?1 OR session = ?1"
                " OR session = (SELECT session FROM job WHERE job = ?1)",
                (name,),
            ).fetchone()
            return row[0] if row else None

        return await self._run(read)

    async def sessions(self, count: int) -> list[dict[str, Any]]:
        """The newest sessions, for people."""
        return await self._rows(
            "SELECT session, seller, state, reason, total_nanos, started_at, receipt_id"
            " FROM session ORDER BY started_at DESC, rowid DESC LIMIT ?",
            (count,),
        )

    # --- jobs ---

    async def put_jobs(self, rows: list[dict[str, Any]]) -> None:
        """Insert or replace job rows in one transaction."""
        names = ", ".join(JOB_COLUMNS)
        marks = ", ".join("?" for _ in JOB_COLUMNS)
        values = [tuple(row.get(name) for name in JOB_COLUMNS) for row in rows]

        def write() -> None:
            self._connection.execute("BEGIN")
            self._connection.executemany(
                f"INSERT OR REPLACE INTO job ({names}) VALUES ({marks})",
                values,
            )
            self._connection.execute("COMMIT")

        await self._run(write)

    async def jobs(self, count: int) -> list[dict[str, Any]]:
        """The newest jobs first."""
        return await self._rows(
            f"SELECT {_SHOWN} FROM job ORDER BY created_at DESC, rowid DESC LIMIT ?", (count,)
        )

    async def job(self, job: str) -> dict[str, Any] | None:
        """One job."""
        rows = await self._rows(f"SELECT {_SHOWN} FROM job WHERE job = ?", (job,))
        return rows[0] if rows else None

    async def ask_cancel(self, job: str, grace_s: int, *, now: float) -> None:
        """Have the program that runs a job cancel it."""
        await self._write(
            "INSERT OR REPLACE INTO cancel (job, grace_s, asked_at) VALUES (?, ?, ?)",
            (job, grace_s, int(now)),
        )

    async def take_cancels(self, jobs: Collection[str], *, now: float) -> dict[str, int]:
        """Which of these jobs somebody wants cancelled, with their grace; each is told once."""
        rows = await self._rows("SELECT job, grace_s, asked_at FROM cancel", ())
        taken = {row["job"]: row["grace_s"] for row in rows if row["job"] in jobs}
        old = [row["job"] for row in rows if row["asked_at"] < now - _CANCEL_KEPT_S]
        for job in {*taken, *old}:
            await self._write("DELETE FROM cancel WHERE job = ?", (job,))
        return taken

    async def end_orphan_jobs(self, *, now: float) -> None:
        """Jobs still marked as running whose program is gone were lost with it.

        What was vouchered in their session and is no other job's cost was theirs: the one that ran
        is the oldest without an end, for a session's orders run one after another.
        """
        rows = await self._rows(
            "SELECT job, owner FROM job WHERE ended_at IS NULL ORDER BY n, created_at", ()
        )
        for row in rows:
            if not processes.alive(row["owner"] or ""):
                await self._write(
                    "UPDATE job SET state = 'failed', reason = 'buyer_lost', ended_at = ?,"
                    f" cost_nanos = {_REST} WHERE job = ? AND ended_at IS NULL",
                    (int(now), row["job"]),
                )
        await self._price_cut_off_jobs()

    async def _price_cut_off_jobs(self) -> None:
        """Jobs that we cut off get their cost once the money of their session has come to rest.

        The oldest order ran and has what is left of the vouchers; one that never left cost nothing.
        """
        rows = await self._rows(
            "SELECT job FROM job WHERE ended_at IS NOT NULL AND cost_nanos IS NULL AND (n IS NULL"
            " OR session IN (SELECT session FROM session WHERE state = 'settled'))"
            " ORDER BY n IS NULL, n, created_at",
            (),
        )
        for row in rows:
            await self._write(
                f"UPDATE job SET cost_nanos = CASE WHEN n IS NULL THEN 0 ELSE {_REST} END"
                " WHERE job = ? AND cost_nanos IS NULL",
                (row["job"],),
            )

    async def spent_by_us(self) -> tuple[int, int] | None:
        """What the sessions of this program have vouchered in nanos, and how many of them are not
        settled; None when it has none."""
        rows = await self._rows(
            "SELECT SUM(total_nanos) AS nanos, SUM(state != 'settled') AS held FROM session"
            " WHERE owner = ?",
            (self._owner,),
        )
        nanos, held = rows[0]["nanos"], rows[0]["held"]
        return None if nanos is None else (int(nanos), int(held))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    async def _rows(self, sql: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            cursor = self._connection.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

        return await self._run(read)

    async def _write(self, sql: str, values: tuple[Any, ...]) -> int:
        return await self._run(lambda: self._connection.execute(sql, values).rowcount)

    async def _run(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)
