"""The clock that deadlines are held to."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_coordinator.clock import SteadyClock

START = 1_800_000_000.0
HOUR = 3_600.0


@dataclass
class Time:
    """A wall clock that can be set, and real time that only passes."""

    wall: float = START
    elapsed: float = 50.0

    def clock(self) -> SteadyClock:
        return SteadyClock(lambda: self.wall, lambda: self.elapsed)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds


def test_it_tells_the_time() -> None:
    assert abs(SteadyClock()() - time.time()) < 60
    now = Time()
    clock = now.clock()
    for _ in range(3):
        now.pass_(17.5)
        assert clock() == pytest.approx(now.wall)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_is_followed_slowly_and_made_good(jump: float) -> None:
    now = Time()
    clock = now.clock()
    now.wall += jump
    assert clock() == START
    now.pass_(60)
    assert clock() == pytest.approx(START + 60 * (1.1 if jump > 0 else 0.9))
    now.pass_(12 * HOUR)
    assert clock() == pytest.approx(now.wall)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(-1e6, 1e6)), max_size=50))
def test_it_never_goes_back_and_never_hurries(steps: list[tuple[float, float]]) -> None:
    now = Time()
    clock = now.clock()
    last = clock()
    for passed, jump in steps:
        now.pass_(passed)
        now.wall += jump
        found = clock()
        slack = 1e-6  # floats of this size are 2e-7 apart
        assert last <= found
        assert 0.9 * passed - slack <= found - last <= 1.1 * passed + slack
        last = found
