"""What this program keeps of its jobs: a row in the store and a log for each, written behind."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec
import trio

from lumaris import processes
from lumaris.job_logs import JobLogs
from lumaris.jobs import JobRequest, JobResult, LogLine
from lumaris.session import Session
from lumaris.store import Store
from lumaris_protocol.messages.execution import Usage

_WRITE_S = 0.2
# What the records say of a job without an end.
_LIVE_STATES = {"accepted": "ordered", "preparing": "preparing", "paused": "paused"}


class JobRecords:
    """The rows of `store` and the logs in `logs`, in batches for as long as `run` does."""

    def __init__(self, store: Store, logs: JobLogs) -> None:
        self._store, self._logs = store, logs
        self._rows: dict[str, dict[str, Any]] = {}

    def begin(self, job: str, session: Session, request: JobRequest, attempt: int) -> None:
        """An attempt was ordered."""
        created = self._rows.get(job, {}).get("created_at", int(time.time()))
        self._rows[job] = {
            "job": job,
            "session": session.session,
            "seller": session.seller,
            "image": request.image,
            "command": msgspec.json.encode(request.command).decode(),
            "state": "running",
            "attempts": attempt,
            "owner": processes.this_process(),
            "created_at": created,
        }

    async def forget_log(self, job: str) -> None:
        """A new attempt prints everything anew."""
        await self._logs.forget(job)

    def add_log(self, job: str, line: LogLine) -> None:
        """Take output; `job` may be another than the line's, for an attempt has an id of its
        own."""
        self._logs.add(replace(line, job=job))

    def progress(self, job: str, n: int, state: str, usage: Usage) -> None:
        """What the seller last said of order `n`, which is this job's."""
        row = self._rows.get(job)
        if row is not None and "ended_at" not in row:
            row |= {"n": n, "state": _LIVE_STATES.get(state, "running")} | _usage_of(usage)

    def fail(self, job: str, reason: str) -> None:
        """The attempt ended without a result."""
        self._rows[job] |= {"state": "failed", "reason": reason, "ended_at": int(time.time())}

    async def finish(self, result: JobResult) -> None:
        """The job ended. Raises OSError when its log could not be written."""
        # Before the row says that there is no more.
        await self._logs.finish(result.job, result.stdout, result.stderr)
        row = self._rows.setdefault(result.job, {"job": result.job})
        row |= {
            "state": "succeeded" if result.ok else "failed",
            "reason": result.reason,
            "detail": result.detail,
            "exit_status": result.exit_status,
            "cost_nanos": result.cost_nanos,
            "wall_ms": result.wall_ms,
            "cpu_ms": result.cpu_ms,
            "fuel": result.fuel,
            "memory_peak_bytes": result.memory_peak_bytes,
            "attempts": result.attempts,
            "ended_at": int(time.time()),
        }

    async def run(self) -> None:
        """Write, for as long as the client lives."""
        while True:
            await trio.sleep(_WRITE_S)
            await self.flush()

    async def flush(self) -> None:
        """Write the rows that changed, and the logs that grew."""
        await self._logs.flush()
        rows = list(self._rows.values())
        self._rows = {job: row for job, row in self._rows.items() if "ended_at" not in row}
        if rows:
            await self._store.put_jobs(rows)


def _usage_of(usage: Usage) -> dict[str, int]:
    return {
        "wall_ms": usage.wall_ms,
        "cpu_ms": usage.cpu_ms,
        "fuel": usage.fuel,
        "memory_peak_bytes": usage.memory_peak_bytes,
    }
