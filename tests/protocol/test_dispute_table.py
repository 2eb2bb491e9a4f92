"""The table of a dispute: every row walked, and nothing outside it."""

from __future__ import annotations

import pytest

from lumaris_protocol import codes
from lumaris_protocol.errors import InvalidTransition, ViolationError
from lumaris_protocol.machines.dispute import DISPUTE, OPEN
from lumaris_protocol.machines.table import Machine, Row

PATHS = {
    "opened": (),
    "evidence": ("evidence",),
    "checking": ("draw",),
    "ruled": ("decide",),
    "settled": ("decide", "pay"),
    "withdrawn": ("withdraw",),
}


def at(state: str) -> Machine:
    machine = Machine(DISPUTE)
    for fact in PATHS[state]:
        machine.take(fact)
    assert machine.state == state
    return machine


def test_the_states() -> None:
    assert set(DISPUTE.states) == set(PATHS)
    assert DISPUTE.final == {"settled", "withdrawn"}
    assert set(PATHS) - DISPUTE.final - {"ruled"} == OPEN


@pytest.mark.parametrize("row", DISPUTE.rows, ids=lambda row: f"{row.state} {row.fact}")
def test_every_row_does_what_it_says(row: Row) -> None:
    machine = at(row.state)
    if row.refusal:
        assert row.refusal in codes.CODES
        with pytest.raises(ViolationError) as caught:
            machine.take(row.fact)
        assert caught.value.code == row.refusal
        assert machine.state == row.state
    else:
        machine.take(row.fact)
        assert machine.state == row.next


def test_nothing_outside_the_table() -> None:
    for state in DISPUTE.final:
        with pytest.raises(InvalidTransition):
            at(state).take("pay")
    with pytest.raises(InvalidTransition):
        Machine(DISPUTE).take("pay")


@pytest.mark.parametrize("state", PATHS)
@pytest.mark.parametrize("fact", ["appeal", "panel"])
def test_what_comes_later_is_refused_everywhere(state: str, fact: str) -> None:
    with pytest.raises(ViolationError, match="not_offered"):
        at(state).take(fact)


@pytest.mark.parametrize("state", sorted(OPEN))
def test_every_waiting_state_can_end_in_every_way(state: str) -> None:
    for fact in ("decide", "agree", "withdraw", "draw", "evidence"):
        assert at(state).can(fact)
