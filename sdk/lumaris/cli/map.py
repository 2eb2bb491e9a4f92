"""`lumaris map`: one command for each of many files, over several sellers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.options import Settings
from lumaris.cli.output import (
    Background,
    GuestOutput,
    Progress,
    clean,
    credits_of,
    emit,
    note,
    shape,
    time_of,
)
from lumaris.cli.work import (
    GUEST_CONTEXT,
    Wants,
    asks,
    check_image,
    confirm,
    failure_of,
    guest_command,
    job_options,
    open_client,
    prepare_out,
    save_artifacts,
    say_wanted,
    terminable,
)
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris.client import Client
    from lumaris.jobs import JobRequest, JobResult

_SHARES = 10  # plain progress is one line for each tenth
_JOB = ("job", "seller", "ok", "reason", "exit_status", "cost_nanos", "wall_ms", "attempts")


class _EachCommand(click.Command):
    """Takes `--each FILE...` wherever it stands, so that a shell's `*.csv` can follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the files and what follows them before the image, one option each."""
        if "--each" in args:
            at = args.index("--each")
            before, after = args[:at], args[at + 1 :]
            end = next((n for n, word in enumerate(after) if word.startswith("-")), len(after))
            files = [word for name in after[:end] for word in ("--each", name)]
            args = [*(files or ["--each"]), *after[end:], *before]
        return super().parse_args(ctx, args)


@click.command("map", cls=_EachCommand, context_settings=GUEST_CONTEXT)
@click.argument("image")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, callback=guest_command)
@click.option(
    "--each",
    "files",
    multiple=True,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="The files, one job each; up to the next option.",
)
@click.option("--sellers", type=click.IntRange(1, 64), default=3, show_default=True)
@click.option(
    "--budget", default="0.1", show_default=True, help="Hard cap for all of it, in credits."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="A folder for each job: its output and what it left in /out.",
)
@job_options
@click.pass_obj
def map_files(
    settings: Settings,
    image: str,
    command: tuple[str, ...],
    files: tuple[Path, ...],
    sellers: int,
    budget: str,
    out: Path | None,
    wants: Wants,
    yes: bool,
    dry_run: bool,
) -> int:
    """Run a command once for each of many files.

    Each FILE becomes one job and is found there as /in/NAME; {} in the command stands for that
    path. A job that its seller failed is run by another one. Exits with 3 when any job failed.

    \b
    lumaris map python:3.12-wasi python -c 'import sys; print(len(open(sys.argv[1]).read()))' {} \\
        --each *.txt
    """
    from lumaris.client import parse_amount

    parse_amount(budget, "--budget")
    requests = [
        wants.request(
            image,
            [word.replace("{}", f"/in/{file.name}") for word in command],
            inputs={_input_name(file): file},
            max_cost=budget,
        )
        for file in files
    ]
    check_image(image, wants.tier)
    if not dry_run:
        prepare_out(out)
    with terminable(), Progress(quiet=settings.json) as progress:
        progress.say("looking for sellers")
        with open_client(settings) as client:
            if not _approved(settings, client, requests, progress, sellers, budget, yes, dry_run):
                return 0
            run = _Map(settings, files, out, progress)
            results = run.go(client, requests, sellers=sellers, budget=budget)
    return run.end(results)


def _input_name(file: Path) -> str:
    from lumaris_protocol.paths import safe_parts

    if not file.is_file():
        raise LumarisError("bad_input", f"There is no file {str(file)!r}.")
    return safe_parts(file.name)[0]


def _approved(
    settings: Settings,
    client: Client,
    requests: Sequence[JobRequest],
    progress: Progress,
    sellers: int,
    budget: str,
    yes: bool,
    dry_run: bool,
) -> bool:
    """Show who would work at what price. Raises LumarisError when declined."""
    client.offers()  # waits until the sellers of a network just joined are known
    report = client.plan(requests[0])
    progress.pause()
    if settings.json:
        if dry_run:
            matches = [
                {"seller": match.advert.message.seller, "lease_nanos": match.lease_nanos}
                for match in report.matches
            ]
            plan = {"jobs": len(requests), "budget": budget, "matches": matches}
            emit({"plan": {**plan, "seen": report.seen, "excluded": report.excluded}})
        return not dry_run
    say_wanted(requests[0])
    used = min(sellers, report.fitting, len(requests))
    note(f"jobs     {len(requests)} over up to {used} of {report.seen} sellers")
    note(f"budget   at most {budget} credits are held in all; what is unused returns")
    if dry_run:
        return False
    if asks(settings, yes=yes) and not confirm():
        raise LumarisError("interrupted", "Declined; nothing was spent.")
    return True


class _Map:
    """A map under way: counts, saves what comes in, and sums up."""

    def __init__(
        self, settings: Settings, files: Sequence[Path], out: Path | None, progress: Progress
    ) -> None:
        self._settings, self._out, self._progress = settings, out, progress
        self._files, self._folders = files, _folders(files)
        self._done = self._failed = self._tenths = 0
        self._artifacts: dict[int, list[dict[str, Any]]] = {}

    def go(
        self, client: Client, requests: Sequence[JobRequest], *, sellers: int, budget: str
    ) -> list[JobResult]:
        """Run all of it. Raises LumarisError; what was delivered until then is saved."""
        with Background() as background:
            results = client.map(
                requests,
                sellers=sellers,
                budget=budget,
                on_result=lambda index, result: background.do(lambda: self._take(index, result)),
            )
        if background.error is not None:
            raise background.error
        return results

    def end(self, results: Sequence[JobResult]) -> int:
        """Print the summary; the exit code."""
        self._progress.pause()
        failed = [index for index, result in enumerate(results) if not result.ok]
        cost = sum(result.cost_nanos for result in results)
        code = LumarisError("job_failed").exit_code if failed else 0
        if self._settings.json:
            emit(self._summary(results, failed, cost))
            return code
        if self._out is None:
            output = GuestOutput()
            for file, result in zip(self._files, results, strict=True):
                _print_output(output, file, result)
        for index in failed:
            failure = failure_of(results[index])
            note(f"failed   {clean(str(self._files[index]))}: {clean(failure.message)}")
        wall = time_of(sum(result.wall_ms for result in results) / 1000)
        note(
            f"{len(results) - len(failed)} ok, {len(failed)} failed, cost {credits_of(cost)},"
            f" {wall} of work by {len({result.seller for result in results})} sellers"
        )
        return code

    def _take(self, index: int, result: JobResult) -> None:
        self._done += 1
        self._failed += not result.ok
        if self._out is not None:
            self._save(self._out / self._folders[index], index, result)
        tenths = self._done * _SHARES // len(self._files)
        if self._progress.moving or tenths > self._tenths:
            self._tenths = tenths
            failed = f", {self._failed} failed" if self._failed else ""
            self._progress.say(f"{self._done}/{len(self._files)} done{failed}")

    def _save(self, folder: Path, index: int, result: JobResult) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "stdout").write_bytes(result.stdout)
            (folder / "stderr").write_bytes(result.stderr)
        except OSError as error:
            raise LumarisError(
                "not_writable", f"{folder}: {error.strerror}", money_moved=result.cost_nanos > 0
            ) from None
        self._artifacts[index] = save_artifacts(result, folder / "out")

    def _summary(
        self, results: Sequence[JobResult], failed: Sequence[int], cost: int
    ) -> dict[str, Any]:
        items = []
        for index, result in enumerate(results):
            item = {
                "file": str(self._files[index]),
                **shape(result, _JOB),
                "stdout": result.stdout.decode(errors="replace"),
                "stderr": result.stderr.decode(errors="replace"),
                "artifacts": self._artifacts.get(index, []),
            }
            if not result.ok:
                item["error"] = failure_of(result).to_json()
            items.append(item)
        return {
            "ok": len(results) - len(failed),
            "failed": len(failed),
            "cost": credits_of(cost),
            "cost_nanos": cost,
            "items": items,
        }


def _print_output(output: GuestOutput, file: Path, result: JobResult) -> None:
    """A job's output, in the order of the files."""
    if result.stdout:
        click.echo(f"==> {clean(str(file))} <==")
        output.write("stdout", result.stdout)
        if not result.stdout.endswith(b"\n"):
            output.write("stdout", b"\n")


def _folders(files: Sequence[Path]) -> list[str]:
    """A folder name for each file; a name seen before gets a number."""
    taken: set[str] = set()
    names = []
    for file in files:
        name, count = file.name, 1
        while name in taken:
            count += 1
            name = f"{file.name}-{count}"
        taken.add(name)
        names.append(name)
    return names
