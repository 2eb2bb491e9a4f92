"""A program nobody here wrote, sold by a real seller: its output is that of the bare program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.planet, pytest.mark.slow]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "workloads.py"
# Packages may have to be downloaded, and a busy machine takes its time to test a tier.
RUN_S_MAX = 300


def test_a_debian_program_makes_the_same_bytes_in_a_sellers_sandbox(
    native_sandbox: None, tmp_path: Path
) -> None:
    options = ["--small", "--json", "--tiers=process", "--rounds=1", f"--work={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), *options],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    if "skipped" in found:  # no apt, or no network for it
        if os.environ.get("LUMARIS_REQUIRE_APT") == "1":
            pytest.fail(found["skipped"])
        pytest.skip(found["skipped"])
    (row,) = found["rows"]
    assert row["tier"] == "process" and row["same"] is True, found
    assert row["cost_nanos"] > 0 and row["cpu_s"] > 0 and row["memory_peak_bytes"] > 0
