"""The main job, whole: what `make demo` runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lumaris import processes
from lumaris.testing import demo, devnet
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.money import NANOS_PER_CREDIT

pytestmark = [pytest.mark.planet, pytest.mark.slow]


def test_the_demo_holds_every_promise_it_prints() -> None:
    lines: list[str] = []
    told = demo.run_demo(None, keep=False, report=lines.append)
    assert told["equal"] and told["killed"]
    assert told["receipts_valid"] and told["double_payment_refused"] and told["balanced"]
    assert told["left_behind"] == []
    assert sum(told["parts_by_seller"].values()) == demo.PARTS
    assert any("attempt 2" in line for line in lines)
    paid = sum(row["paid_nanos"] for row in told["paid"].values())
    assert told["buyer_held_nanos"] == 0
    assert told["buyer_free_nanos"] == 100 * NANOS_PER_CREDIT - paid
    for row in told["paid"].values():
        assert row["seller_nanos"] + row["fee_nanos"] == row["paid_nanos"]


def test_the_text_is_large_enough_and_splits_without_loss() -> None:
    text = demo.read_text(None)
    assert len(text.encode()) >= demo.INPUT_BYTES_MIN
    parts = demo.split_text(text, demo.PARTS)
    assert len(parts) == demo.PARTS and "".join(parts) == text


def test_a_text_that_cannot_be_split_is_refused_before_anything_starts(tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one line")
    for path in (short, tmp_path / "absent.txt"):
        with pytest.raises(LumarisError, match="bad_input"):
            demo.run_demo(path, keep=False, report=lambda _: None)


@pytest.mark.parametrize("after", ["coordinator", "ready"])
def test_interrupting_the_demo_at_any_time_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, after: str
) -> None:
    """Ctrl-C while the devnet starts, and in mid-run."""
    tmp_path = tmp_path_factory.mktemp("d")  # a Unix socket's path must be short
    program = subprocess.Popen(
        [sys.executable, "-m", "lumaris.cli", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    assert program.stdout is not None
    if after == "coordinator":
        wait_for(lambda: list(tmp_path.glob("*/devnet/devnet.json")), "the coordinator runs")
    else:
        said_first = next((line for line in program.stdout if b"ready in" in line), b"")
        assert said_first
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=60)
    assert program.returncode == 130, said
    assert b"Traceback" not in said
    wait_for(lambda: not processes.naming(str(tmp_path)), "no process is left")
    assert list(tmp_path.iterdir()) == []


def wait_for(holds: Callable[[], object], what: str) -> None:
    """Wait until something holds, at most 30 s."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


def test_a_devnet_in_a_folder_of_ours_leaves_our_files(tmp_path: Path) -> None:
    ours = tmp_path / "thesis.txt"
    ours.write_text("precious")
    with devnet.Devnet(tmp_path, sellers=1):
        assert (tmp_path / "devnet.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
