"""What may be offered follows from what was seen, and for how long it was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumaris_node.selftest import keep, suite
from lumaris_node.selftest.keep import (
    FILE,
    RETEST_S,
    RETRY_S,
    STANDS_S,
    UNSHOWN_RETRY_S,
    Assurance,
)
from lumaris_node.selftest.rows import SUITE_VERSION, Row
from lumaris_node.selftest.suite import Report
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Runtime

RUNTIME = Runtime(tier="process", version="bubblewrap-0.11.0", assurance="process")


class Tier:
    tier = "process"

    def __init__(self) -> None:
        self.runtime: Runtime | None = RUNTIME

    async def probe(self) -> Runtime | None:
        return self.runtime


class Attacks:
    """Stands for the suite: says what it is told, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0
        self.held: bool | None = True
        self.slow = False  # the machine shows nothing

    async def run(self, executor: Any, runtime: Runtime, folder: Path, *, clock: Any) -> Report:
        self.times += 1
        if self.held is None:
            raise LumarisError("platform_error", "No engine.")
        mount = Row("mount", self.held and not self.slow, detail="EPERM", shown=not self.slow)
        rows = (mount, Row("run_from_tmp", False, counts=False))
        return Report(
            runtime.tier,
            runtime.version,
            runtime.assurance,
            SUITE_VERSION,
            int(clock()),
            0.1,
            rows,
        )


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Attacks:
    found = Attacks()
    monkeypatch.setattr(suite, "run", found.run)
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Checked:
    """An Assurance and the one tier that it decides about."""

    def __init__(self, folder: Path, clock: Clock, tier: Tier) -> None:
        self._kept, self._tier = Assurance(folder, clock=clock), tier
        self.reports = self._kept.reports
        self.why_not = self._kept.why_not
        self.retest = self._kept.retest

    async def check_all(self) -> tuple[Runtime, ...]:
        if self._tier.runtime is None:
            self._kept.lost(self._tier.tier)
            return ()
        standing = self._kept.standing(self._tier.runtime)
        found = await self._kept.check(self._tier, self._tier.runtime)  # type: ignore[arg-type]
        self.reports = self._kept.reports
        assert standing in (None, found) or found is None or found.tested_at > standing.tested_at
        return (found,) if found else ()


def assurance(folder: Path, clock: Clock, tier: Tier | None = None) -> Checked:
    return Checked(folder, clock, tier or Tier())


async def test_what_held_is_offered_with_its_suite_and_date(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    (found,) = await assurance(tmp_path, clock).check_all()
    assert (found.suite, found.tested_at) == (SUITE_VERSION, 1_000_000)
    assert found.assurance == "process"


async def test_it_stands_for_a_day_and_over_a_restart(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    first = assurance(tmp_path, clock)
    assert await first.check_all()
    clock.now += RETEST_S - 1
    second = assurance(tmp_path, clock)
    assert [row.name for row in second.reports[0].rows] == ["mount", "run_from_tmp"]
    assert await second.check_all()
    assert attacks.times == 1
    clock.now += 1
    assert await second.check_all()
    assert attacks.times == 2


@pytest.mark.parametrize("change", ["version", "assurance", "suite", "boot", "clock"])
async def test_a_change_is_tested_anew(
    tmp_path: Path, attacks: Attacks, clock: Clock, change: str, monkeypatch: pytest.MonkeyPatch
):
    tier = Tier()
    assert await assurance(tmp_path, clock, tier).check_all()
    if change == "version":
        tier.runtime = Runtime(tier="process", version="bubblewrap-0.12.0", assurance="process")
    elif change == "assurance":
        tier.runtime = Runtime(tier="process", version=RUNTIME.version, assurance="process+more")
    elif change == "suite":
        monkeypatch.setattr(keep, "SUITE_VERSION", SUITE_VERSION + 1)
    elif change == "boot":
        monkeypatch.setattr(keep, "boot_id", lambda: "another")
    else:
        clock.now -= 10  # set back: nothing says how old the report is
    await assurance(tmp_path, clock, tier).check_all()
    assert attacks.times == 2


async def test_what_failed_is_not_offered_and_tried_again_later(
    tmp_path: Path, attacks: Attacks, clock: Clock, caplog: pytest.LogCaptureFixture
):
    attacks.held = False
    kept = assurance(tmp_path, clock)
    assert await kept.check_all() == ()
    assert "row=mount" in caplog.text
    assert "row=run_from_tmp" not in caplog.text
    assert [row.name for row in kept.reports[0].failures] == ["mount"]
    attacks.held = True
    assert await kept.check_all() == (), "not at once"
    clock.now += RETRY_S
    assert len(await kept.check_all()) == 1


async def test_a_busy_machine_withdraws_nothing_that_was_seen(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    kept = assurance(tmp_path, clock)
    (first,) = await kept.check_all()
    attacks.slow = True
    clock.now += RETEST_S
    assert await kept.check_all() == (first,), "the day is not over"
    assert attacks.times == 2
    assert await kept.check_all() == (first,)
    assert attacks.times == 2, "not at once"
    clock.now += UNSHOWN_RETRY_S
    attacks.slow = False
    (again,) = await kept.check_all()
    assert again.tested_at > first.tested_at
    assert attacks.times == 3


async def test_what_stays_unshown_is_not_offered_for_longer_than_a_day(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    kept = assurance(tmp_path, clock)
    assert await kept.check_all()
    attacks.slow = True
    clock.now += STANDS_S
    assert await kept.check_all() == ()
    assert "too slow" in kept.why_not("process")
    assert "mount" in kept.why_not("process")


async def test_what_was_never_shown_is_tried_again_in_a_minute(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    attacks.slow = True
    kept = assurance(tmp_path, clock)
    assert await kept.check_all() == ()
    assert await kept.check_all() == ()
    assert attacks.times == 1
    attacks.slow = False
    clock.now += UNSHOWN_RETRY_S
    assert await kept.check_all()


async def test_a_failure_withdraws_at_once(tmp_path: Path, attacks: Attacks, clock: Clock):
    kept = assurance(tmp_path, clock)
    assert await kept.check_all()
    attacks.held = False
    assert await kept.check_all(), "it is not due"
    kept.retest("process")
    assert await kept.check_all() == ()
    assert kept.why_not("process") == "Attacks succeeded: mount."


async def test_a_tier_that_was_gone_is_attacked_when_it_is_back(
    tmp_path: Path, attacks: Attacks, clock: Clock
):
    tier = Tier()
    kept = assurance(tmp_path, clock, tier)
    assert await kept.check_all()
    tier.runtime = None
    assert await kept.check_all() == ()
    tier.runtime = RUNTIME
    assert await kept.check_all()
    assert attacks.times == 2


async def test_attacks_that_could_not_be_run_are_no_proof(
    tmp_path: Path, attacks: Attacks, clock: Clock, caplog: pytest.LogCaptureFixture
):
    attacks.held = None
    kept = assurance(tmp_path, clock)
    assert await kept.check_all() == ()
    assert "No engine." in caplog.text
    attacks.held = True
    assert await kept.check_all(), "the next time it may run"


async def test_a_broken_file_is_no_report(tmp_path: Path, attacks: Attacks, clock: Clock):
    (tmp_path / FILE).write_bytes(b"\xff{")
    kept = assurance(tmp_path, clock)
    assert kept.reports == ()
    assert await kept.check_all()


def test_a_report_without_rows_does_not_hold():
    assert not Report("wasm", "1", "wasm", 1, 0, 0.0, ()).held
