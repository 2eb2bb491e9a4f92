"""A writer's session with a PostgreSQL server that waits only for what is asked.

A batch is paid for in round trips. So a statement inside a transaction is sent without waiting for
its answer, and the answers are collected when somebody looks: at rows, at a row count, at the end
of the batch. An error therefore comes late. It is raised as itself while the operation that caused
it still runs, and as `Late` afterwards. libpq's pipeline mode skips everything between an error and
the next look, so nothing that followed the error has happened.

The driver's own pipeline costs ten times as much of our processor; this one uses libpq itself.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGresult

from lumaris_coordinator.bounds import (
    PIPELINE_BYTES_MAX,
    PIPELINE_FLUSH,
    PIPELINE_MAX,
    PREPARED_MAX,
    WRITE_S_MAX,
)
from lumaris_coordinator.store.port import Late, Row
from lumaris_protocol.errors import LumarisError

_INT8, _FLOAT8, _BYTEA, _UNKNOWN = 20, 701, 17, 0
_BEGIN, _COMMIT, _ROLLBACK = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
_SAVEPOINT, _BACK, _RELEASE = (
    "SAVEPOINT operation",
    "ROLLBACK TO operation",
    "RELEASE operation",
)
_GOOD: Final = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)
_ABORTED: Final = pq.ExecStatus.PIPELINE_ABORTED
_SYNC: Final = pq.ExecStatus.PIPELINE_SYNC
# The server ends a statement after WRITE_S_MAX by itself; who is silent for longer is gone.
_SILENCE_MS: Final = int(2 * WRITE_S_MAX * 1_000)

_Key = tuple[str, tuple[int, ...]]


class Cursor:
    """What a statement found or changed, once it is asked."""

    __slots__ = ("_result", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._result: PGresult | None = None

    def take(self, result: PGresult) -> None:
        """The answer has come."""
        self._result = result

    @property
    def rowcount(self) -> int:
        """How many rows the statement touched. Raises what the statement has caused."""
        return self._settled().command_tuples or 0

    @property
    def command(self) -> bytes:
        """What the server says it has done. Raises what the statement has caused."""
        return self._settled().command_status or b""

    def fetchall(self) -> list[Row]:
        """All rows. Raises what the statement has caused."""
        return self._session.rows(self._settled())

    def __iter__(self) -> Iterator[Row]:
        return iter(self.fetchall())

    def _settled(self) -> PGresult:
        if self._result is None:
            self._session.settle()
        assert self._result is not None, "an answer without a statement"
        return self._result


@dataclass(frozen=True, slots=True)
class _Sent:
    """A statement on its way: who waits for it, what it prepares, and in which operation."""

    cursor: Cursor
    prepares: _Key | None
    operation: int


class Session:
    """The session of one writer. Outside a transaction every statement is waited for.

    `begin` and `commit` are what `BEGIN IMMEDIATE` and `COMMIT` stand for.
    """

    def __init__(
        self,
        inner: psycopg.Connection[Any],
        *,
        begin: Sequence[str],
        commit: Sequence[str],
        translate: Callable[[str], str],
    ) -> None:
        self.inner, self.round_trips = inner, 0
        self._translate = translate
        self._stand_for = {_BEGIN: tuple(begin), _COMMIT: tuple(commit)}
        self._pgconn = inner.pgconn
        self._pgconn.enter_pipeline_mode()
        self._transformer = Transformer(inner)
        self._prepared: dict[_Key, bytes] = {}
        self._made = 0  # names are never used again
        self._sent: deque[_Sent] = deque()
        self._bytes = 0
        # Which operation of the transaction runs, and whether it still does.
        self._operation, self._open = 0, False
        self._error: tuple[int, psycopg.Error] | None = None
        # A transaction begins and ends only where the answer is waited for.
        self._in_transaction, self._lost = False, False
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)

    def execute(self, sql: str, values: Sequence[object] = (), /) -> Cursor:
        """Send one statement of the shared subset. Raises what an earlier one has caused."""
        if sql == _ROLLBACK:
            return self._give_up()
        if sql == _BACK:
            self._error = None  # the savepoint forgets it
        self._complain()
        if sql in self._stand_for:
            return self._turn(sql)
        if sql == _SAVEPOINT:
            self._operation, self._open = self._operation + 1, True
        cursor = self._send(sql, values)
        if sql == _RELEASE:
            self._open = False
        full = len(self._sent) >= PIPELINE_MAX or self._bytes > PIPELINE_BYTES_MAX
        if full or not self._in_transaction:
            self.settle()
        elif len(self._sent) % PIPELINE_FLUSH == 0:
            self._pgconn.flush()  # the server works while the next operations run
        return cursor

    def settle(self) -> None:
        """Wait for all answers. Raises the first error in them, or the one not yet dealt with."""
        if self._sent:
            self._wait_for_all()
        self._complain()

    def rows(self, result: PGresult) -> list[Row]:
        """The rows of an answer as Python values."""
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, tuple)

    def close(self) -> None:
        """End the session. A writer's presence ends with the call, not when the server notices."""
        if not self._lost and not self.inner.closed:
            with contextlib.suppress(psycopg.Error):
                self._give_up()
                self.execute("SELECT pg_advisory_unlock_all()")
        self.inner.close()

    def _turn(self, sql: str) -> Cursor:
        """Begin or commit, and wait for it."""
        *others, last = self._stand_for[sql]
        for statement in others:
            self._send(statement, ())
        cursor = self._send(last, ())
        self.settle()
        self._operation, self._open = 0, False
        # A server answers COMMIT with ROLLBACK, and no error, when there was nothing to keep.
        if self._in_transaction is (sql == _COMMIT) or (
            sql == _COMMIT and cursor.command != b"COMMIT"
        ):
            raise psycopg.InternalError("the transaction is not in the state it should be in")
        return cursor

    def _give_up(self) -> Cursor:
        """Undo the transaction, whatever is wrong with it."""
        if self._sent:
            self._wait_for_all()
        self._error = None
        cursor = self._send(_ROLLBACK, ())
        self.settle()
        return cursor

    def _complain(self) -> None:
        if self._error is None:
            return
        operation, error = self._error
        if not self._in_transaction:
            self._error = None
        if operation == 0 or (operation == self._operation and self._open):
            raise error
        raise Late(self._operation - operation, error)

    def _send(self, sql: str, values: Sequence[object]) -> Cursor:
        if self._lost:
            raise psycopg.OperationalError("the session has ended")
        types, given, formats = _dumped(values)
        key = (sql, types)
        name = self._prepared.get(key)
        if name is None and len(self._prepared) < PREPARED_MAX:
            self._made += 1
            name = self._prepared[key] = b"l%d" % self._made
            self._pgconn.send_prepare(name, self._translate(sql).encode(), types)
            self._sent.append(_Sent(Cursor(self), key, self._operation))
        if name is None:
            query = self._translate(sql).encode()
            self._pgconn.send_query_params(query, given, types, formats)
        else:
            self._pgconn.send_query_prepared(name, given, formats)
        cursor = Cursor(self)
        self._sent.append(_Sent(cursor, None, self._operation))
        self._bytes += sum(len(value) for value in given if value is not None)
        return cursor

    def _wait_for_all(self) -> None:
        """One round trip. Raises psycopg.OperationalError when the session has ended in it."""
        self._lost = True  # until all of it is here
        self.round_trips += 1
        self._pgconn.pipeline_sync()
        while self._pgconn.flush():
            if self._wait(select.POLLIN | select.POLLOUT) & select.POLLIN:
                self._pgconn.consume_input()
        sent, self._sent, self._bytes = self._sent, deque(), 0
        for one in sent:
            self._collect(one, self._answer())
            if self._next() is not None:
                raise psycopg.OperationalError("the server's answers are out of step")
        if self._answer().status != _SYNC:
            raise psycopg.OperationalError("the server's answers are out of step")
        self._in_transaction = self._pgconn.transaction_status != pq.TransactionStatus.IDLE
        self._lost = False

    def _collect(self, one: _Sent, result: PGresult) -> None:
        one.cursor.take(result)
        if result.status in _GOOD:
            return
        if one.prepares is not None:
            del self._prepared[one.prepares]
        if result.status != _ABORTED and self._error is None:
            self._error = (one.operation, error_from_result(result, encoding="utf-8"))

    def _answer(self) -> PGresult:
        result = self._next()
        if result is None or self._pgconn.status == pq.ConnStatus.BAD:
            reason = result.error_message if result is not None else b""
            raise psycopg.OperationalError(reason.decode(errors="replace") or "the session ended")
        return result

    def _next(self) -> PGresult | None:
        """The driver would wait with the interpreter's lock held; this does not."""
        while self._pgconn.is_busy():
            self._wait(select.POLLIN)
            self._pgconn.consume_input()
        return self._pgconn.get_result()

    def _wait(self, events: int) -> int:
        self._poll.modify(self._pgconn.socket, events)
        found = self._poll.poll(_SILENCE_MS)
        if not found:
            raise psycopg.OperationalError("the server is silent")
        return found[0][1]


def _dumped(
    values: Sequence[object],
) -> tuple[tuple[int, ...], list[bytes | None], list[int]]:
    """Types, values and formats as the server takes them. Raises LumarisError `malformed`."""
    types, given, formats = [], [], []
    for value in values:
        kind, text = _dump(value)
        types.append(kind)
        given.append(text)
        formats.append(int(kind == _BYTEA))
    return tuple(types), given, formats


def text_of(value: str) -> bytes:
    """A text as the server takes it. Raises LumarisError `malformed` for one that it cannot keep:
    that is the fault of who sent it."""
    try:
        text = value.encode()
    except UnicodeEncodeError:
        text = b"\0"
    if b"\0" in text:
        raise LumarisError("malformed", "A text holds a NUL, or what is no Unicode character.")
    return text


def _dump(value: object) -> tuple[int, bytes | None]:
    """One type for every whole number, so that a statement is prepared once and not once per size.
    The server itself finds out what a text is meant to be."""
    if isinstance(value, str):
        return _UNKNOWN, text_of(value)
    if isinstance(value, int):
        return _INT8, b"%d" % value
    if value is None:
        return _UNKNOWN, None
    if isinstance(value, bytes | bytearray | memoryview):
        return _BYTEA, bytes(value)
    if isinstance(value, float):
        return _FLOAT8, repr(value).encode()
    raise psycopg.ProgrammingError(f"no value of a statement: {type(value).__name__}")
