"""The benchmark of execution in its smallest form: it runs, and it sees what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

ROOT = Path(__file__).parents[3]


def run_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/execution.py", *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_the_process_tier_is_measured(native_sandbox: None):
    ended = run_benchmark("--json", "--quick", "--only", "process")
    assert ended.returncode == 0, ended.stderr
    rows: list[dict[str, Any]] = json.loads(ended.stdout)["rows"]
    names = [row["name"] for row in rows]
    assert "process / bare bubblewrap" in names
    assert not [name for name in names if name.startswith("not measured")]


@pytest.mark.slow
def test_a_part_that_there_is_not():
    ended = run_benchmark("--only", "process,nothing")
    assert ended.returncode == 2
    assert "unknown parts: nothing" in ended.stderr


@pytest.mark.slow
async def test_what_runs_is_counted_and_what_ended_is_not(
    native_sandbox: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.parts.execution_ends import ORPHANS, Leftovers
    from benchmarks.parts.execution_world import discard, opened_world
    from benchmarks.parts.report import Report

    with opened_world(tmp_path, Report(as_json=True), quick=True, engine=False) as world:
        looked = Leftovers(world)
        before = looked.counts()
        async with world.executor("process") as executor:
            assert executor is not None
            handle = await executor.prepare(world.spec(world.image, ORPHANS))
            try:
                await executor.start(handle, discard)
                with trio.fail_after(20):
                    while world.survivors() < 2:
                        await trio.sleep(0.01)
                more = looked.counts() - before
                assert more["processes"] >= 2
                assert more["control groups"] >= 1
            finally:
                await executor.destroy(handle)
        assert looked.counts() == before
