"""The coordinator's program in a process of its own, which dies at a chosen point of a batch.

The seam is here and not in the program: its writer's session is wrapped before it starts. It is
armed by a file, so that a test prepares in peace and knows which request is the last.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal, get_args

from lumaris_coordinator import Settings, app, cli
from lumaris_coordinator.events import hub
from lumaris_coordinator.store.bus import Bus
from lumaris_coordinator.store.port import Connection, Cursor
from lumaris_coordinator.store.store import Store
from tests.coordinator.builders import Clock

Point = Literal[
    "before BEGIN", "in an operation", "before COMMIT", "after COMMIT", "before publication"
]
POINTS: Final[tuple[Point, ...]] = get_args(Point)
_START_S_MAX: Final = 60.0


class Deadly:
    """A writer's session in which the program dies once it is armed."""

    def __init__(self, inner: Connection, point: Point, armed: Path) -> None:
        self._inner, self._point, self._armed = inner, point, armed

    def execute(self, sql: str, values: Sequence[object] = (), /) -> Cursor:
        if sql == "BEGIN IMMEDIATE":
            self._pass("before BEGIN")
        elif sql == "COMMIT":
            self._inner.execute("SELECT 1").fetchall()  # all of it has reached the database
            self._pass("before COMMIT")
        found = self._inner.execute(sql, values)
        if sql.startswith("INSERT INTO transfer"):
            self._inner.execute("SELECT 1").fetchall()
            self._pass("in an operation")
        elif sql == "COMMIT":
            self._pass("after COMMIT")
        return found

    def _pass(self, point: Point) -> None:
        if point == self._point and self._armed.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Line:
    """What the program prints, sent to who waits for it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def write(self, text: str) -> None:
        if text.strip():
            self._pipe.send(text)

    def flush(self) -> None:
        """Nothing waits."""


def serve(settings: Settings, point: Point | None, armed: Path, pipe: Pipe) -> None:
    """Be the program."""
    connect, wake = Store.connect_writer, Bus.wake
    changes: list[tuple[object, str, object]] = [(app, "SteadyClock", Clock)]
    if point is not None:
        deadly = partial(Deadly, point=point, armed=armed)
        changes.append((Store, "connect_writer", lambda store: deadly(connect(store))))
    if point == "before publication":
        changes.append((hub, "EVENTS_POLL_S", _START_S_MAX))
        changes.append((Bus, "wake", lambda bus: None if armed.exists() else wake(bus)))
    for owner, name, value in changes:
        setattr(owner, name, value)
    sys.stdout = _Line(pipe)
    cli.run(settings)


@dataclass
class Victim:
    """The process; `peer_id` is what a market asks its coordinator for."""

    process: BaseProcess
    peer_id: str
    url: str
    armed: Path

    def arm(self) -> None:
        """The next time it comes to its point it dies."""
        self.armed.touch()

    def kill(self) -> None:
        """Die now, wherever it is."""
        self.process.kill()

    def died(self) -> bool:
        """Whether it was killed. Waits for its end."""
        self.process.join(_START_S_MAX)
        return self.process.exitcode == -signal.SIGKILL


@contextmanager
def victim(settings: Settings, point: Point | None, armed: Path) -> Iterator[Victim]:
    """The program, forked from a process that has imported it already: a start takes little."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(settings, point, armed, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(_START_S_MAX), "it did not start"
        word, peer, url = str(ours.recv()).split()
        assert word == "ready"
        yield Victim(process, peer, url, armed)
    finally:
        process.kill()
        process.join(_START_S_MAX)
        process.close()
        ours.close()
