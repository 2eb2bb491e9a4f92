"""The main job, whole: what `make demo` runs."""

from __future__ import annotations

import pytest

from lumaris.testing import demo
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
