"""A transition table: all states and moves of a machine as data.

A row says: in `state`, the fact `fact` leads to `next`. A row with a `refusal` code is a rule that
the other side broke; it names the refusal and keeps the state. A pair without a row is our own bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lumaris_protocol.errors import InvalidTransition, ViolationError

_STORY_MAX = 64  # facts kept for a bug report: more than any order takes


@dataclass(frozen=True)
class Row:
    """One move."""

    state: str
    fact: str
    next: str
    does: str = ""
    refusal: str = ""


class Table:
    """The moves of one machine, checked when built: one row for a (state, fact) pair."""

    def __init__(
        self, name: str, *, initial: str, final: Iterable[str], rows: Iterable[Row]
    ) -> None:
        self.name, self.initial, self.final = name, initial, frozenset(final)
        self.rows = tuple(rows)
        self._moves = {(row.state, row.fact): row for row in self.rows}
        if len(self._moves) != len(self.rows):
            raise ValueError(f"{name}: a state and fact have two rows")

    @property
    def states(self) -> tuple[str, ...]:
        """Every state, in the order of first mention."""
        names = [self.initial, *(name for row in self.rows for name in (row.state, row.next))]
        return tuple(dict.fromkeys(names))

    def find(self, state: str, fact: str) -> Row | None:
        """The row of a pair, if there is one."""
        return self._moves.get((state, fact))

    def markdown(self) -> str:
        """The table for people."""
        lines = ["| state | fact | next state | does |", "|---|---|---|---|"]
        for row in self.rows:
            does = f"refused: `{row.refusal}`" if row.refusal else row.does
            lines.append(f"| {row.state} | {row.fact} | {row.next} | {does} |")
        return "\n".join(lines)


def late(states: Iterable[str], facts: Iterable[str]) -> tuple[Row, ...]:
    """Rows for what the other side said before it knew of the end: nobody broke a rule."""
    facts = tuple(facts)
    return tuple(Row(state, fact, state, "late: ignored") for state in states for fact in facts)


class Machine:
    """A walk over a table. After a fact that the table does not allow it is in `error` for good."""

    ERROR = "error"

    def __init__(self, table: Table, state: str | None = None) -> None:
        self.table = table
        self.state = table.initial if state is None else state
        self._story: list[str] = []

    @property
    def story(self) -> tuple[str, ...]:
        """The last facts, oldest first."""
        return tuple(self._story)

    @property
    def done(self) -> bool:
        """Whether the machine has reached a final state (or error)."""
        return self.state in self.table.final or self.state == self.ERROR

    def take(self, fact: str) -> Row:
        """Move on a fact. Raises ViolationError for a refusal row, InvalidTransition for none."""
        row = self.table.find(self.state, fact)
        self._story = [*self._story[-_STORY_MAX:], fact]
        if row is None:
            state, self.state = self.state, self.ERROR
            raise InvalidTransition(self.table.name, state, fact, self.story)
        if row.refusal:
            raise ViolationError(row.refusal, f"{self.table.name} is {self.state}: {fact} refused.")
        self.state = row.next
        return row

    def can(self, fact: str) -> bool:
        """Whether the table has a move (not a refusal) for the fact."""
        row = self.table.find(self.state, fact)
        return row is not None and not row.refusal
