"""What commands print: data on stdout; plans, progress and hints on stderr.

Text that a stranger sent never reaches a terminal with its control characters.
"""

from __future__ import annotations

import codecs
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.status import Status

_NANOS_PER_CREDIT: Final = 1_000_000_000
_PEER_CHARS: Final = 10
# C0 and C1 controls and the marks that turn text around, shown as a question mark.
_UNSAFE: Final = dict.fromkeys(
    [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "?"
)
_UNSAFE_IN_LOGS: Final = {code: mark for code, mark in _UNSAFE.items() if chr(code) not in "\t\n\r"}


def clean(text: str) -> str:
    """Text for one line of a terminal."""
    return text.translate(_UNSAFE)


def emit(data: object) -> None:
    """One JSON document on stdout."""
    import json

    click.echo(json.dumps(data, indent=2))


def note(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def paint(text: str, colour: str) -> str:
    """Coloured, on a terminal that wants colours."""
    wanted = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return click.style(text, fg=colour, bold=True) if wanted else text


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns on stdout, without borders."""
    lines = [list(headers), *([clean(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values on stdout, a line each."""
    shown = [(name, clean(str(value))) for name, value in pairs]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        click.echo(f"{name.ljust(width)}  {value}".rstrip())


def credits_of(nanos: int) -> str:
    """Credits, exact to the nano, without the protocol's imports."""
    whole, rest = divmod(abs(nanos), _NANOS_PER_CREDIT)
    return f"{'-' if nanos < 0 else ''}{whole}.{rest:09d}"


def size_of(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"


def time_of(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def date_of(seconds: int | None) -> str:
    """A moment in local time."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def peer_of(peer: str) -> str:
    """The end of a peer id, which is where they differ; JSON output has all of it."""
    return clean(peer[-_PEER_CHARS:])


class Background:
    """Does small pieces of work in order in a thread of its own.

    Observers are called from the thread that keeps sessions alive; a slow terminal or disk must
    not hold that one up. What is queued is bounded by what a job may print and deliver.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="lumaris-output")

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all of it is done. The first failure is kept in `error`."""
        self._queue.put(None)
        self._thread.join()

    def do(self, work: Callable[[], None]) -> None:
        """Do this after what is queued."""
        self._queue.put(work)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # reported by whoever owns this, after the job
                self.error = self.error or error


class GuestOutput:
    """A guest's output on our stdout and stderr: untouched in a pipe, harmless on a terminal."""

    def __init__(self) -> None:
        self._decoders = {
            name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")
        }
        self._broken: set[str] = set()

    def write(self, stream: str, data: bytes) -> None:
        """Write a piece. A reader that went away is like one that reads no more."""
        if stream in self._broken:
            return
        target = sys.stdout if stream == "stdout" else sys.stderr
        try:
            if target.isatty():
                target.write(self._decoders[stream].decode(data).translate(_UNSAFE_IN_LOGS))
            else:
                target.flush()
                target.buffer.write(data)
            target.flush()
        except BrokenPipeError:
            self._broken.add(stream)
            # What Python still holds for the pipe is flushed at exit, and must not fail then.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), target.fileno())


class Progress:
    """What happens now: one moving line on a terminal, plain lines elsewhere, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._status: Status | None = None
        self.moving = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Progress:
        if self.moving:
            from rich.console import Console
            from rich.status import Status

            self._status = Status("", console=Console(stderr=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def say(self, text: str) -> None:
        """Show what happens now."""
        if self._status is not None:
            from rich.markup import escape

            self._status.update(escape(clean(text)))
            self._status.start()
        elif not self._quiet:
            note(clean(text))

    def pause(self) -> None:
        """Take the moving line away, before something else is printed."""
        if self._status is not None:
            self._status.stop()


def shape(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """Some fields of a record, for JSON."""
    return {name: getattr(record, name) for name in names}
