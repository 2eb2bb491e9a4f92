"""What the records say of jobs whose program was killed: what they cost, what they had printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumaris.job_logs import JobLogs
from lumaris.jobs import LogLine
from lumaris.store import Store

_NOBODY = "0:0"


async def test_vouchers_of_a_killed_program_are_the_cost_of_what_ran(tmp_path: Path):
    store = Store(tmp_path / "buyer.db")
    try:
        store._connection.execute(
            "INSERT INTO session (session, seller, by_buyer, by_seller, state, started_at,"
            " total_nanos) VALUES ('ses_1', 'peer', x'', x'', 'open', 1, 100)"
        )
        common = {"session": "ses_1", "owner": _NOBODY, "created_at": 1, "state": "running"}
        ended = {**common, "job": "job_1", "n": 1, "cost_nanos": 30, "ended_at": 2}
        waits = {**common, "job": "job_3", "n": 3}
        ran = {**common, "job": "job_2", "n": 2}
        alone = {**common, "job": "job_4", "session": "ses_unknown"}
        await store.put_jobs([ended, waits, ran, alone])
        await store.end_orphan_jobs(now=5)
        rows = {row["job"]: row for row in await store.jobs(9)}
    finally:
        store.close()
    costs = {job: row["cost_nanos"] for job, row in rows.items()}
    assert costs == {"job_1": 30, "job_2": 70, "job_3": 0, "job_4": 0}
    assert rows["job_2"]["reason"] == "buyer_lost"


async def test_output_is_kept_as_it_arrives_and_made_whole_at_the_end(tmp_path: Path):
    logs, folder = JobLogs(tmp_path), tmp_path / "job_1"
    logs.add(LogLine("job_1", "stdout", b"one "))
    await logs.flush()
    logs.add(LogLine("job_1", "stdout", b"two "))
    logs.add(LogLine("job_1", "stderr", b"oops"))
    await logs.flush()
    await logs.flush()
    assert (folder / "stdout").read_bytes() == b"one two "
    assert (folder / "stderr").read_bytes() == b"oops"
    logs.add(LogLine("job_1", "stdout", b"three"))
    await logs.finish("job_1", b"one two three", b"oops")
    await logs.flush()
    assert (folder / "stdout").read_bytes() == b"one two three"


async def test_a_new_attempt_prints_anew(tmp_path: Path):
    logs = JobLogs(tmp_path)
    logs.add(LogLine("job_1", "stdout", b"first"))
    await logs.flush()
    logs.add(LogLine("job_1", "stdout", b" rest"))
    await logs.forget("job_1")
    await logs.flush()
    assert not (tmp_path / "job_1" / "stdout").exists()


async def test_a_disk_that_takes_nothing_ends_no_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "job_1").write_bytes(b"in the way")
    logs = JobLogs(tmp_path)
    logs.add(LogLine("job_1", "stdout", b"x"))
    await logs.flush()
    assert "log not kept" in caplog.text


async def test_a_job_that_was_cut_off_costs_what_its_session_settled_for(tmp_path: Path):
    store = Store(tmp_path / "buyer.db")
    try:
        assert await store.spent_by_us() is None
        store._connection.execute(
            "INSERT INTO session (session, seller, by_buyer, by_seller, state, started_at,"
            " total_nanos, owner) VALUES ('ses_1', 'peer', x'', x'', 'ended', 1, 100, ?)",
            (store._owner,),
        )
        common = {"session": "ses_1", "created_at": 1, "ended_at": 2, "state": "failed"}
        sold = {**common, "job": "job_1", "n": 1, "cost_nanos": 30}
        ran = {**common, "job": "job_2", "n": 2}
        waited = {**common, "job": "job_3", "n": 3}
        stayed = {**common, "job": "job_4"}
        await store.put_jobs([stayed, waited, ran, sold])
        await store.end_orphan_jobs(now=5)
        costs = {row["job"]: row["cost_nanos"] for row in await store.jobs(9)}
        assert costs == {"job_1": 30, "job_2": None, "job_3": None, "job_4": 0}
        assert await store.spent_by_us() == (100, 1)
        await store.keep_receipt("ses_1", "rcp_1", b"")
        await store.end_orphan_jobs(now=5)
        costs = {row["job"]: row["cost_nanos"] for row in await store.jobs(9)}
        assert costs == {"job_1": 30, "job_2": 70, "job_3": 0, "job_4": 0}
        assert await store.spent_by_us() == (100, 0)
    finally:
        store.close()
