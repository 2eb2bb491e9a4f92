"""`lumaris job exec`, `shell`, `forward`, `stdin`, `cancel`: reaching into a job that runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lumaris.cli.options import CONTEXT, SECONDS, Settings, buyer_options, local_options
from lumaris.cli.output import GuestOutput, credits_of, emit, note
from lumaris.cli.work import GUEST_CONTEXT, guest_command
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import GRACE_S_MAX

if TYPE_CHECKING:
    from lumaris.live import Command, Place
    from lumaris.store import Store
    from lumaris_overlay.ports import Overlay

T = TypeVar("T")

_READ_BYTES: Final = 65_536
_LEAVE: Final = b"\x1d"  # Ctrl-], as telnet has it: a hung shell must not hold the terminal
# What `exec --json` shows of each stream at most.
_SHOWN_BYTES_MAX: Final = 8 << 20
# After the end of its order a job's records are written within this.
_RECORDS_S: Final = 30
_RETRY_S: Final = 0.5

Work = Callable[["Overlay", "Place", "Store"], Awaitable[T]]


def reach(settings: Settings, job: str, work: Work[T]) -> T:
    """Do something with a job that runs, from this program. Raises LumarisError."""
    import trio

    from lumaris import live, profile

    async def main() -> T:
        async with opened(settings) as store:
            place = await live.find_place(store, job)
            chosen = profile.load(state=settings.state, coordinator=settings.coordinator)
            async with live.open_live(chosen) as overlay:
                return await work(overlay, place, store)

    return trio.run(main)


class opened:  # noqa: N801 - used as a function
    """The buyer's records while the context lasts. Raises LumarisError `not_found`."""

    def __init__(self, settings: Settings) -> None:
        from lumaris.cli.local import state_folder

        self._folder: Path = state_folder(settings)

    async def __aenter__(self) -> Store:
        from lumaris.store import Store

        path = self._folder / "buyer.db"
        if not path.exists():
            raise LumarisError(
                "not_found",
                f"There are no jobs in {self._folder}.",
                hint="--state names another folder.",
            )
        self._store = Store(path)
        return self._store

    async def __aexit__(self, *_: object) -> None:
        self._store.close()


async def read_stdin() -> bytes:
    """The next bytes of our standard input, b"" at its end. Runs in any trio loop."""
    import trio

    try:
        await trio.lowlevel.wait_readable(0)
    except OSError:  # a file is always ready, and cannot be waited for
        return await trio.to_thread.run_sync(os.read, 0, _READ_BYTES, abandon_on_cancel=True)
    return os.read(0, _READ_BYTES)


# --- commands ---


@click.command("exec", context_settings=GUEST_CONTEXT)
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--no-stdin", is_flag=True, help="Leave its standard input empty.")
@click.argument("job_id", metavar="JOB")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, callback=guest_command)
@buyer_options
@click.pass_obj
def exec_command(
    settings: Settings, job_id: str, command: tuple[str, ...], tty: bool, no_stdin: bool
) -> int:
    """Run another command in the sandbox of a running job.

    Options stand before JOB; what follows it is the command's. The exit status is the command's.
    """
    session = _Exec(settings, command, tty=tty, stdin=not no_stdin)
    return reach(settings, job_id, session.run)


@click.command("shell", context_settings=GUEST_CONTEXT)
@click.argument("job_id", metavar="JOB")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, callback=guest_command)
@buyer_options
@click.pass_obj
def shell(settings: Settings, job_id: str, command: tuple[str, ...]) -> int:
    """Open a shell in the sandbox of a running job: /bin/sh, or COMMAND.

    Ctrl-] leaves a shell that no longer answers.
    """
    if settings.json:
        raise LumarisError("usage", "A shell is for people; `lumaris job exec` has --json.")
    if not sys.stdin.isatty():
        raise LumarisError(
            "usage", "A shell needs a terminal.", hint="Use `lumaris job exec JOB -- COMMAND`."
        )
    return reach(settings, job_id, _Exec(settings, command or ("/bin/sh",), tty=True).run)


class _Exec:
    """One command in a job, joined to our own streams."""

    def __init__(
        self, settings: Settings, command: tuple[str, ...], *, tty: bool, stdin: bool = True
    ) -> None:
        self._json, self._command, self._tty, self._stdin = settings.json, command, tty, stdin
        self._raw = tty and not settings.json and sys.stdin.isatty() and sys.stdout.isatty()
        self._output = GuestOutput()
        self._shown = {"stdout": bytearray(), "stderr": bytearray()}

    async def run(self, overlay: Overlay, place: Place, _: Store) -> int:
        """Until it has ended, or Ctrl-]; its exit status."""
        import trio

        from lumaris import live

        rows, columns = _terminal_size()
        async with live.open_command(
            overlay, place, self._command, tty=self._tty, rows=rows, columns=columns
        ) as command:
            with _raw_terminal(self._raw):
                async with trio.open_nursery() as nursery:
                    if self._stdin:
                        nursery.start_soon(self._send_stdin, command, nursery.cancel_scope)
                    else:
                        await command.send_eof()
                    if self._tty:
                        nursery.start_soon(_follow_size, command)
                    while (output := await command.receive()) is not None:
                        await trio.to_thread.run_sync(self._show, *output, abandon_on_cancel=True)
                    nursery.cancel_scope.cancel()
        status = command.exit_status
        if self._json:
            texts = {name: data.decode(errors="replace") for name, data in self._shown.items()}
            emit({"job": place.job, "exit_status": status, **texts})
        elif status is None:
            note("left; the command was ended")
        return 0 if status is None else status

    async def _send_stdin(self, command: Command, scope: Any) -> None:
        import trio

        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await read_stdin():
                if self._raw and _LEAVE in data:
                    scope.cancel()
                    return
                await command.send(data)
            await command.send_eof()

    def _show(self, stream: str, data: bytes) -> None:
        if self._json:
            kept = self._shown[stream]
            kept += data[: max(0, _SHOWN_BYTES_MAX - len(kept))]
        elif self._raw:
            sys.stdout.flush()
            while data:
                data = data[os.write(1, data) :]
        else:
            self._output.write(stream, data)


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    """Every key goes to the command; the terminal is as before afterwards, whatever happens."""
    if not wanted:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


async def _follow_size(command: Command) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGWINCH) as signals:
        async for _ in signals:
            await command.resize(*_terminal_size())


def _terminal_size() -> tuple[int, int]:
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return 24, 80
    return max(1, size.lines), max(1, size.columns)


# --- ports and input ---


def _ports(_c: click.Context, _p: click.Parameter, value: str) -> tuple[int, int]:
    local, colon, port = value.rpartition(":")
    words = (local, port) if colon else (port, port)
    if not all(word.isascii() and word.isdigit() and len(word) <= 5 for word in words):
        raise click.BadParameter(f"{value!r} is not LOCAL:PORT.")
    numbers = int(words[0]), int(words[1])
    if max(numbers) > 65_535 or numbers[1] == 0:
        raise click.BadParameter(f"{value!r} names no port.")
    return numbers


@click.command("forward", context_settings=CONTEXT)
@click.argument("job_id", metavar="JOB")
@click.argument("ports", metavar="[LOCAL:]PORT", callback=_ports)
@buyer_options
@click.pass_obj
def forward(settings: Settings, job_id: str, ports: tuple[int, int]) -> None:
    """Reach a port inside a running job at 127.0.0.1:LOCAL, until Ctrl-C or the job's end.

    LOCAL 0 takes any free port.
    """

    def ready(local: int) -> None:
        if settings.json:
            emit({"job": job_id, "local": f"127.0.0.1:{local}", "port": ports[1]})
        else:
            click.echo(f"127.0.0.1:{local} is port {ports[1]} of {job_id}")
        sys.stdout.flush()

    async def work(overlay: Overlay, place: Place, store: Store) -> None:
        import trio

        from lumaris import live
        from lumaris.cli import errors

        async with trio.open_nursery() as nursery:

            async def until_ended() -> None:
                await live.wait_until_ended(store, job_id)
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_ended)
            await live.forward(
                overlay,
                place,
                ports[1],
                local=("127.0.0.1", ports[0]),
                ready=ready,
                report=lambda error: errors.say(error, money=False),
            )
            nursery.cancel_scope.cancel()

    ended = True
    try:
        reach(settings, job_id, work)
    except* KeyboardInterrupt:
        ended = False  # the usual end
    if ended:
        note(f"{job_id} has ended")


@click.command("stdin", context_settings=CONTEXT)
@click.argument("job_id", metavar="JOB")
@buyer_options
@click.pass_obj
def stdin(settings: Settings, job_id: str) -> None:
    """Send our standard input to a running job's, and end it.

    The job must have been started with `lumaris run --stdin-later`.
    """
    sent = 0

    async def source() -> bytes:
        nonlocal sent
        data = await read_stdin()
        sent += len(data)
        return data

    async def work(overlay: Overlay, place: Place, _: Store) -> None:
        from lumaris import live

        await live.send_stdin(overlay, place, source)

    reach(settings, job_id, work)
    if settings.json:
        emit({"job": job_id, "sent_bytes": sent})


@click.command("cancel", context_settings=CONTEXT)
@click.argument("job_id", metavar="JOB")
@click.option(
    "--grace",
    type=SECONDS,
    default="2s",
    show_default=True,
    help="Time to end by itself after it was asked to, at most 30 s.",
)
@local_options
@click.pass_obj
def cancel(settings: Settings, job_id: str, grace: int) -> None:
    """End a running job, whichever program of yours runs it; what was vouchered stays paid."""
    import trio

    from lumaris import live

    if grace > GRACE_S_MAX:
        raise LumarisError("usage", f"--grace is at most {GRACE_S_MAX} s.")

    async def main() -> dict[str, Any]:
        async with opened(settings) as store:
            return await live.cancel(store, job_id, grace_s=grace)

    row = trio.run(main)
    nanos = row.get("cost_nanos")
    cost = None if nanos is None else credits_of(nanos)
    if settings.json:
        names = ("job", "state", "reason", "cost_nanos")
        emit({**{name: row.get(name) for name in names}, "cost": cost})
    else:
        reason = row.get("reason") or row.get("state")
        click.echo(f"{job_id} ended: {reason}; cost {cost or 'known when its session is settled'}")


# --- the log ---


def follow(settings: Settings, job_id: str, folder: Path) -> None:
    """Print what a running job prints until its end, also when it moves to another seller."""
    import trio

    try:
        trio.run(_Follow(settings, job_id, folder).run)
    except* KeyboardInterrupt:
        pass  # the reader has seen enough; the job goes on


def wait(settings: Settings, job_id: str) -> None:
    """Wait until a job has ended."""
    import trio

    from lumaris import live

    async def main() -> None:
        async with opened(settings) as store:
            await live.wait_until_ended(store, job_id)

    trio.run(main)


class _Follow:
    def __init__(self, settings: Settings, job_id: str, folder: Path) -> None:
        self._settings, self._job, self._folder = settings, job_id, folder
        self._output = GuestOutput()
        self._shown = {"stdout": 0, "stderr": 0}
        self._place: Place | None = None

    async def run(self) -> None:
        import trio

        from lumaris import live, profile

        async with opened(self._settings) as store:
            row = await store.job(self._job)
            if row is not None and row["ended_at"] is None:
                settings = self._settings
                chosen = profile.load(state=settings.state, coordinator=settings.coordinator)
                async with live.open_live(chosen) as overlay:
                    await self._follow(overlay, store)
            with trio.move_on_after(_RECORDS_S):
                await live.wait_until_ended(store, self._job)
        for name, shown in self._shown.items():
            with suppress(FileNotFoundError), (self._folder / name).open("rb") as file:
                file.seek(shown)
                while data := file.read(_READ_BYTES):
                    self._output.write(name, data)

    async def _follow(self, overlay: Overlay, store: Store) -> None:
        """Read the log at whichever seller the job is, until it is over."""
        import trio

        from lumaris import live

        while True:
            row = await store.job(self._job)
            if row is None or row["ended_at"] is not None:
                return
            try:
                place = await live.find_place(store, self._job)
                if place != self._place:  # a new attempt prints everything anew
                    self._place, self._shown = place, dict.fromkeys(self._shown, 0)
                await live.follow_log(overlay, place, self._show, offset=sum(self._shown.values()))
            except LumarisError as error:
                if error.code not in ("not_attached", "not_found"):
                    raise
                await trio.sleep(_RETRY_S)
            else:
                return

    async def _show(self, stream: str, data: bytes) -> None:
        import trio

        await trio.to_thread.run_sync(self._output.write, stream, data, abandon_on_cancel=True)
        self._shown[stream] += len(data)
