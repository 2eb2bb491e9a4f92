"""`lumaris demo`: the whole market in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lumaris.cli.options import CONTEXT, Settings, load, plain_options
from lumaris.cli.output import clean, emit, note
from lumaris.cli.work import terminable


@click.command("demo", context_settings=CONTEXT)
@click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, readable=True),
    metavar="FILE",
    help="A text file of yours to work on.",
)
@click.option("--keep", is_flag=True, help="Leave the market's folder for a look afterwards.")
@plain_options
@click.pass_obj
def demo(settings: Settings, input_file: Path | None, keep: bool) -> int:
    """Run a whole market on this machine, with real jobs.

    Starts a coordinator, sellers and a buyer on loopback, runs jobs between them, verifies the
    receipts, and ends everything again. Exits with 1 when any of its checks does not hold.
    """
    run: Any = load("lumaris.testing.demo:run_demo")

    def say(text: str) -> None:
        if settings.json:
            note(clean(text))
        else:
            click.echo(clean(text))

    with terminable():
        found: dict[str, Any] = run(input_file, keep, say)
    if settings.json:
        emit(found)
    failed = [name for name, value in found.items() if value is False]
    if found.get("left_behind"):
        failed.append("left_behind")
    if failed and not settings.json:
        note(clean(f"not as it should be: {', '.join(failed)}"))
    return 1 if failed else 0
