"""`lumaris run`: one command on a seller's machine, as if it ran here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.live import read_stdin
from lumaris.cli.options import Settings
from lumaris.cli.output import (
    Background,
    GuestOutput,
    Progress,
    credits_of,
    emit,
    note,
    peer_of,
    shape,
    size_of,
    time_of,
)
from lumaris.cli.work import (
    GUEST_CONTEXT,
    Wants,
    amount,
    asks,
    check_image,
    confirm,
    describe_artifact,
    exit_code_of,
    failure_of,
    guest_command,
    job_options,
    open_client,
    prepare_out,
    save_artifacts,
    say_wanted,
    terminable,
)
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris.client import Client
    from lumaris.jobs import JobRequest, JobResult, JobUpdate, LogLine, Plan
    from lumaris_protocol.messages.advert import Feature

_PLAN = (
    "seller",
    "region",
    "quote",
    "currency",
    "rate_nanos_per_s",
    "start_nanos",
    "cap_nanos",
    "hold_until",
    "seen",
)
_RESULT = (
    "job",
    "session",
    "seller",
    "reason",
    "exit_status",
    "wall_ms",
    "cpu_ms",
    "memory_peak_bytes",
    "attempts",
)


@click.command("run", context_settings=GUEST_CONTEXT)
@click.argument("image")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, callback=guest_command)
@click.option(
    "--in",
    "inputs",
    multiple=True,
    metavar="[GUEST=]PATH",
    help="A file or folder to send; the guest finds it under /in. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where to put what the guest leaves in /out.",
)
@click.option("--stdin", "-i", is_flag=True, help="Our standard input is the guest's; one attempt.")
@click.option("--stdin-later", is_flag=True, help="Its input comes from `lumaris job stdin`.")
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Choice(("exec", "forward")),
    help="The seller must allow it while the job runs; repeatable.",
)
@click.option("--max-cost", default="0.01", show_default=True, help="Hard cap, in credits.")
@job_options
@click.pass_obj
def run(
    settings: Settings,
    image: str,
    command: tuple[str, ...],
    inputs: tuple[str, ...],
    out: Path | None,
    stdin: bool,
    stdin_later: bool,
    features: tuple[Feature, ...],
    max_cost: str,
    wants: Wants,
    yes: bool,
    dry_run: bool,
) -> int:
    """Run a command on a seller's machine.

    IMAGE is a catalog name such as python:3.12-wasi, a local .wasm file, a container image as a
    local .tar, a registry's HOST/NAME:TAG, or sha256:<digest>. What follows it is the guest's,
    options too; ours stand before it. The guest's output is ours, and so is its exit code when it
    is 1 to 124.

    \b
    lumaris run python:3.12-wasi python -c 'print(6 * 7)'
    lumaris run --in data.csv --out results/ python:3.12-wasi python -c '...'
    """
    request = wants.request(image, command, inputs=walk_inputs(inputs), max_cost=max_cost)
    request = replace(request, stdin=stdin or stdin_later, features=features)
    check_image(image, wants.tier)
    if not dry_run:
        prepare_out(out)
    with terminable():
        return _Run(settings, request, yes=yes, dry_run=dry_run, out=out, stdin=stdin).go()


def walk_inputs(values: Sequence[str]) -> dict[str, Path]:
    """Guest paths and the local files behind them. Raises LumarisError `bad_input`."""
    found: dict[str, Path] = {}
    for value in values:
        guest, source = _split(value)
        for name, file in _files(guest, source):
            if name in found:
                raise LumarisError("bad_input", f"Two inputs are named {name!r} in the guest.")
            found[name] = file
            if len(found) > limits.INPUT_FILES_MAX:
                raise LumarisError(
                    "bad_input", f"More than {limits.INPUT_FILES_MAX} input files; pack them."
                )
    return found


def _news(event: JobUpdate, *, moving: bool) -> str:
    if event.state == "preparing" and event.detail:
        share = f" {size_of(event.done)} of {size_of(event.total)}" if event.total else ""
        detail = f": {event.detail}{share if moving else ''}"
    else:
        detail = f" ({event.detail})" if event.detail else ""
    return f"{event.job} {event.state}{detail} at {peer_of(event.seller)}"


def _split(value: str) -> tuple[str, Path]:
    guest, equals, source = value.partition("=")
    if not equals or Path(value).exists():
        guest, source = "", value
    path = Path(source)
    if not source or not path.exists():
        raise LumarisError("bad_input", f"There is no file {source!r}.")
    # Users know the guest's folder as /in and may well write it.
    guest = guest.removeprefix("/in/").strip("/") if guest != "/in" else "."
    return guest, path


def _files(guest: str, source: Path) -> Iterator[tuple[str, Path]]:
    """The files of one argument. A folder's links out of it are refused: strangers get these."""
    if not source.is_dir():
        if guest == ".":
            guest = ""
        yield guest or source.resolve().name, source
        return
    root = source.resolve()
    prefix = "" if guest == "." else f"{guest or root.name}/"

    def fail(error: OSError) -> None:
        raise LumarisError("bad_input", f"{error.filename}: {error.strerror}.")

    for folder, folders, names in os.walk(root, onerror=fail):
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = Path(folder, name)
            if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
                raise LumarisError(
                    "bad_input", f"{path} is a link; name what it points to with its own --in."
                )
        for name in sorted(names):
            path = Path(folder, name)
            if not path.is_file():
                raise LumarisError("bad_input", f"{path} is not a plain file.")
            yield f"{prefix}{path.relative_to(root).as_posix()}", path


@dataclass
class _Run:
    """One run from its plan to its last line."""

    settings: Settings
    request: JobRequest
    yes: bool
    dry_run: bool
    out: Path | None
    stdin: bool = False
    plan: Plan | None = None
    guest: GuestOutput = field(default_factory=GuestOutput)
    progress: Progress = field(default_factory=Progress)
    background: Background = field(default_factory=Background)
    _prepared: tuple[str, str] = ("", "")

    def go(self) -> int:
        result, receipt = None, None
        quiet = self.settings.json
        self.progress = Progress(quiet=quiet)
        with self.progress, self.background:
            self.progress.say("looking for sellers")
            with open_client(self.settings) as client:
                try:
                    result = client.run_request(
                        self.request,
                        observe=self._observe,
                        approve=self._approve,
                        stdin=read_stdin if self.stdin else None,
                    )
                except LumarisError as error:
                    if not (self.dry_run and self.plan and error.code == "interrupted"):
                        raise
                if result is not None:
                    receipt = self._settle(client, result)
        if result is None:
            if quiet:
                emit({"plan": self._plan_json()})
            return 0
        return self._end(result, receipt)

    # --- before ---

    def _approve(self, plan: Plan) -> bool:
        """Show the signed quote, and ask where somebody can answer. Called in a worker thread."""
        self.plan = plan
        self.progress.pause()
        if not self.settings.json:
            self._say_plan(plan)
        if self.dry_run:
            return False
        if asks(self.settings, yes=self.yes):
            return confirm()
        return True

    def _say_plan(self, plan: Plan) -> None:
        say_wanted(self.request)
        most = min(plan.cap_nanos, plan.start_nanos + plan.rate_nanos_per_s * self.request.wall_s)
        note(f"seller   {peer_of(plan.seller)} in {plan.region}, signed quote {plan.quote}")
        note(
            f"price    {credits_of(plan.start_nanos)} to start,"
            f" {amount(plan.rate_nanos_per_s * 3600, plan.currency)} an hour;"
            f" at most {credits_of(most)} for this job"
        )
        note(f"cap      {amount(plan.cap_nanos, plan.currency)} is held; what is unused returns")
        excluded = ", ".join(f"{code} {count}" for code, count in plan.excluded.items())
        note(
            f"others   {len(plan.considered)} more fit of {plan.seen} seen"
            + (f" (excluded: {excluded})" if excluded else "")
        )

    def _plan_json(self) -> dict[str, Any]:
        assert self.plan is not None
        considered = [
            {"seller": seller, "region": region, "lease_nanos": nanos}
            for seller, region, nanos in self.plan.considered
        ]
        excluded = dict(self.plan.excluded)
        return {**shape(self.plan, _PLAN), "considered": considered, "excluded": excluded}

    # --- during ---

    def _observe(self, event: JobUpdate | LogLine) -> None:
        """From the thread that keeps the session alive: hand it on and return."""
        self.background.do(lambda: self._show(event))

    def _show(self, event: JobUpdate | LogLine) -> None:
        from lumaris.jobs import LogLine

        if not isinstance(event, LogLine):
            # Where no line moves, what is prepared is named once.
            known, self._prepared = self._prepared, (event.state, event.detail)
            if self.progress.moving or event.state != "preparing" or known != self._prepared:
                self.progress.say(_news(event, moving=self.progress.moving))
        elif not self.settings.json:
            self.progress.pause()
            self.guest.write(event.stream, event.data)

    # --- after ---

    def _settle(self, client: Client, result: JobResult) -> Any:
        """The session's receipt, or None when the coordinator is away: it is settled later."""
        from lumaris.cli.local import open_receipt

        self.background.do(lambda: self.progress.say(f"{result.job} settling"))
        client.settle()
        data = client.receipt(result.session)
        return open_receipt(data) if data is not None else None

    def _end(self, result: JobResult, receipt: Any) -> int:
        code = exit_code_of(result)
        artifacts = [
            describe_artifact(path, artifact, artifact.file)
            for path, artifact in result.artifacts.items()
        ]
        if self.out is not None:
            artifacts = save_artifacts(result, self.out)
        if self.settings.json:
            emit(self._result_json(result, receipt, artifacts))
            return code
        if not result.ok and result.reason != "exit_nonzero":
            from lumaris.cli import errors

            errors.say(failure_of(result))
        note(self._last_line(result, receipt))
        return code

    def _last_line(self, result: JobResult, receipt: Any) -> str:
        currency = self.plan.currency if self.plan else ""
        outcome = "succeeded" if result.ok else f"failed ({failure_of(result).code})"
        status = "" if result.exit_status is None else f" exit {result.exit_status}"
        money = f"cost {amount(result.cost_nanos, currency)}"
        if receipt is None:
            rest = "settles later"
        else:
            rest = f"released {credits_of(receipt.refund_nanos)}  receipt {receipt.receipt}"
        return (
            f"{outcome}{status}  {result.job}  seller {peer_of(result.seller)}"
            f"  {time_of(result.wall_ms / 1000)}  {money}  {rest}"
        )

    def _result_json(
        self, result: JobResult, receipt: Any, artifacts: list[dict[str, Any]]
    ) -> dict[str, Any]:
        report: dict[str, Any] = {
            "ok": result.ok,
            **shape(result, _RESULT),
            "image": self.request.image,
            "command": list(self.request.command),
            "currency": self.plan.currency if self.plan else None,
            "cost": result.cost,
            "cost_nanos": result.cost_nanos,
            "released_nanos": receipt.refund_nanos if receipt else None,
            "receipt": receipt.receipt if receipt else None,
            "stdout": result.stdout.decode(errors="replace"),
            "stderr": result.stderr.decode(errors="replace"),
            "artifacts": artifacts,
            "plan": self._plan_json() if self.plan else None,
        }
        if not result.ok:
            report["error"] = failure_of(result).to_json()
        return report
