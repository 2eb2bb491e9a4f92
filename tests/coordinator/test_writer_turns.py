"""Operations that run in the event loop's thread, and commits that do not."""

from __future__ import annotations

import threading
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris_coordinator.bounds import OPERATIONS_PER_TURN_MAX
from lumaris_coordinator.store import turns
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.store.turns import Turn
from lumaris_coordinator.store.writer import _Job
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market
from tests.coordinator.test_writer import adding, entries, writer_on

STORES = ("sqlite", "postgres")


class Watched:
    """Notes which thread runs which statement."""

    def __init__(self, inner: Connection, seen: set[tuple[str, int]]) -> None:
        self._inner, self._seen = inner, seen

    def execute(self, sql: str, values: Any = ()) -> Any:
        self._seen.add((sql.partition(" ")[0], threading.get_ident()))
        return self._inner.execute(sql, values)

    def close(self) -> None:
        self._inner.close()


async def test_only_what_waits_for_the_disk_runs_beside_the_loop(tmp_path: Path) -> None:
    writer, seen = writer_on(tmp_path / "db", local=True), set[tuple[str, int]]()
    async with writer.running():
        assert writer._connection is not None
        writer._connection = Watched(writer._connection, seen)
        assert await writer.submit(adding(1)) == 1
    here = threading.get_ident()
    assert {name for name, thread in seen if thread != here} == {"BEGIN", "COMMIT"}
    assert {name for name, thread in seen if thread == here} >= {"SAVEPOINT", "INSERT", "RELEASE"}
    assert entries(tmp_path / "db") == [1]


async def test_which_store_runs_them_where(market: Market) -> None:
    found = await market.coordinator.store.submit(lambda _connection: threading.get_ident())
    assert (found == threading.get_ident()) is not market.coordinator.store.backend.shared


async def test_the_loop_goes_on_between_turns(tmp_path: Path) -> None:
    writer, number = writer_on(tmp_path / "db", local=True), 4 * OPERATIONS_PER_TURN_MAX
    seen: list[str] = []

    def operation(_connection: Connection) -> None:
        seen.append("operation")

    async def spin() -> None:
        while True:
            seen.append("other")
            await trio.lowlevel.checkpoint()

    async with writer.running(), trio.open_nursery() as spinning:
        spinning.start_soon(spin)
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(writer.submit, operation)
        spinning.cancel_scope.cancel()
    assert seen.count("operation") == number
    assert writer.stats.batch_largest > OPERATIONS_PER_TURN_MAX
    runs = [len(list(run)) for name, run in groupby(seen) if name == "operation"]
    assert max(runs) <= 2 * OPERATIONS_PER_TURN_MAX


async def test_a_failed_operation_loses_nothing_but_itself(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db", local=True)
    codes: list[str] = []

    async def submit(n: int) -> None:
        def operation(connection: Connection) -> None:
            adding(n)(connection)
            if n % 3 == 0:
                raise LumarisError("no_funds")

        try:
            await writer.submit(operation)
        except LumarisError as error:
            codes.append(error.code)

    async with writer.running(), trio.open_nursery() as nursery:
        for n in range(40):
            nursery.start_soon(submit, n)
    assert codes == ["no_funds"] * 14
    assert entries(tmp_path / "db") == [n for n in range(40) if n % 3]


async def test_a_failed_commit_is_acknowledged_to_nobody(tmp_path: Path) -> None:
    broken = threading.Event()
    writer = writer_on(tmp_path / "db", broken, local=True)
    async with writer.running():
        broken.set()
        with pytest.raises(LumarisError, match="busy"):
            await writer.submit(adding(1))
        broken.clear()
        await writer.submit(adding(2))
    assert entries(tmp_path / "db") == [2]


def test_without_an_event_loop_the_operations_still_run(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db", local=True)
    connection = writer._connect()

    def ended(_work: object) -> None:
        raise trio.RunFinishedError

    writer._post = ended
    jobs = [_Job(adding(n)) for n in range(3)]
    writer._run_in_loop(connection, jobs)
    connection.close()
    assert [job.value for job in jobs] == [0, 1, 2]


def test_work_is_run_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WRITE_S_MAX", 0.01)
    ran: list[int] = []
    turn = Turn(lambda: ran.append(1))
    with pytest.raises(TimeoutError):
        turn.wait()
    turn.run()  # too late: whoever waited has gone on without it
    assert ran == []
    begun = Turn(lambda: ran.append(2))
    begun.run()
    begun.wait()
    assert ran == [2]


def test_work_that_runs_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WRITE_S_MAX", 0.0)
    entered, release = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert release.wait(10)

    turn = Turn(work)
    loop = threading.Thread(target=turn.run)
    loop.start()
    assert entered.wait(10)
    waiting = threading.Thread(target=turn.wait)
    waiting.start()
    release.set()
    waiting.join(10)
    loop.join(10)
    assert not waiting.is_alive()
    assert not turn._late


def test_an_interruption_is_the_loops_own() -> None:
    def work() -> None:
        raise KeyboardInterrupt

    turn = Turn(work)
    with pytest.raises(KeyboardInterrupt):
        turn.run()
    with pytest.raises(RuntimeError, match="interrupted"):
        turn.wait()
