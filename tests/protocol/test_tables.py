"""Every transition table, and the machine that walks them."""

from __future__ import annotations

import pytest

from lumaris_protocol import codes
from lumaris_protocol.errors import InvalidTransition, ViolationError
from lumaris_protocol.machines import job
from lumaris_protocol.machines.buyer import BUYER_SESSION
from lumaris_protocol.machines.desk import QUOTE
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.machines.job import JOB
from lumaris_protocol.machines.seller import SELLER_SESSION
from lumaris_protocol.machines.table import Machine, Row, Table

TABLES = {table.name: table for table in (SELLER_SESSION, BUYER_SESSION, JOB, ESCROW, QUOTE)}
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def reachable(table: Table) -> set[str]:
    found, todo = {table.initial}, [table.initial]
    while todo:
        state = todo.pop()
        for row in table.rows:
            if row.state == state and row.next not in found:
                found.add(row.next)
                todo.append(row.next)
    return found


def shortest(table: Table, goal: str) -> list[str]:
    """Facts that lead from the start to a state."""
    paths: dict[str, list[str]] = {table.initial: []}
    todo = [table.initial]
    while goal not in paths:
        state = todo.pop(0)
        for row in table.rows:
            if row.state == state and not row.refusal and row.next not in paths:
                paths[row.next] = [*paths[state], row.fact]
                todo.append(row.next)
    return paths[goal]


@tables
def test_every_state_is_reachable_and_every_final_one_exists(table: Table) -> None:
    assert set(table.states) == reachable(table)
    assert table.final <= set(table.states)


@tables
def test_every_state_leads_to_an_end_and_no_end_leads_back(table: Table) -> None:
    for state in table.states:
        if state in table.final:
            assert all(row.next == state for row in table.rows if row.state == state)
        else:
            assert reachable(Table("from", initial=state, final=(), rows=table.rows)) & table.final


@tables
def test_every_row_does_what_it_says(table: Table) -> None:
    for row in table.rows:
        machine = Machine(table)
        for fact in shortest(table, row.state):
            machine.take(fact)
        assert machine.can(row.fact) is not bool(row.refusal)
        if row.refusal:
            with pytest.raises(ViolationError) as caught:
                machine.take(row.fact)
            assert caught.value.code == row.refusal
            assert machine.state == row.state == row.next
        else:
            assert machine.take(row.fact) is row
            assert machine.state == row.next


@tables
def test_every_refusal_is_a_known_code(table: Table) -> None:
    assert {row.refusal for row in table.rows if row.refusal} <= set(codes.CODES)


@tables
def test_every_row_is_rendered(table: Table) -> None:
    lines = table.markdown().splitlines()
    assert len(lines) == len(table.rows) + 2
    for row, line in zip(table.rows, lines[2:], strict=True):
        assert line.startswith(f"| {row.state} | {row.fact} | {row.next} | ")
        assert line.endswith(f"refused: `{row.refusal}` |" if row.refusal else f"{row.does} |")


@tables
def test_a_fact_without_a_row_is_an_error_for_good(table: Table) -> None:
    machine = Machine(table)
    assert not machine.can("no such fact")
    with pytest.raises(InvalidTransition) as caught:
        machine.take("no such fact")
    assert caught.value.state == table.initial
    assert caught.value.story == ("no such fact",)
    assert machine.state == Machine.ERROR
    assert machine.done
    with pytest.raises(InvalidTransition):
        machine.take(table.rows[0].fact)


def test_the_story_is_bounded() -> None:
    table = Table("loop", initial="a", final=(), rows=(Row("a", "tick", "a"),))
    machine = Machine(table, "a")
    for _ in range(1000):
        machine.take("tick")
    assert 64 <= len(machine.story) <= 65
    assert not machine.done


def test_two_rows_for_one_pair_are_refused() -> None:
    rows = (Row("a", "x", "b"), Row("a", "x", "c"))
    with pytest.raises(ValueError, match="two rows"):
        Table("bad", initial="a", final=("b", "c"), rows=rows)


@tables
def test_peers_words_never_break_a_session_machine(table: Table) -> None:
    """A stranger's message is taken or refused in every state; it is never our own bug."""
    if table not in (SELLER_SESSION, BUYER_SESSION):
        return
    own = {"over", "close_sent"}
    said = {row.fact for row in table.rows} - own
    for state in table.states:
        for fact in said:
            assert table.find(state, fact) is not None, f"{state} cannot take {fact}"


def test_every_end_reason_of_an_order_is_a_fact() -> None:
    facts = {row.fact for row in JOB.rows}
    reasons = [name for name in codes.CODES if name.startswith("killed_")]
    reasons += ["succeeded", "exit_nonzero", "cancelled", "platform_error", "bad_image", "unpaid"]
    reasons += ["bad_command", "bad_input", "tier_unavailable", "prepare_timeout", "lease_ended"]
    for reason in reasons:
        assert job.fact_of(reason) in facts
    assert job.fact_of("killed_memory") == "limit_hit"
    assert job.fact_of("killed_owner") == "stopped"
    assert job.fact_of("succeeded") == "exited_zero"
    with pytest.raises(KeyError):
        job.fact_of("no_such_reason")


@pytest.mark.parametrize("reason", ["killed_disk", "bad_input", "platform_error", "cancelled"])
@pytest.mark.parametrize("state", ["preparing", "running", "paused"])
def test_an_order_can_fail_wherever_it_is(state: str, reason: str) -> None:
    machine = Machine(JOB)
    for fact in shortest(JOB, state):
        machine.take(fact)
    machine.take(job.fact_of(reason))
    assert machine.done


def test_a_guest_may_end_while_it_is_frozen() -> None:
    machine = Machine(JOB)
    for fact in ("prepare", "prepared", "start", "pause", "exited_zero", "collected"):
        machine.take(fact)
    assert machine.state == "succeeded"
