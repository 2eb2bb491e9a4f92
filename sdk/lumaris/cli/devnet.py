"""`lumaris devnet`: a market on this machine that stays until it is told to go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lumaris.cli.options import CONTEXT, Settings, load, plain_options
from lumaris.cli.output import clean, emit, note, peer_of, table
from lumaris.cli.work import terminable

_PART = "lumaris.testing.devnet"
_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The devnet's folder.  [default: in the user's state folder]",
)


@click.group("devnet", context_settings=CONTEXT)
def devnet() -> None:
    """Keep a market on this machine to try things on.

    One coordinator, some sellers and a buyer with test credit, each its own process on loopback.
    """


@devnet.command("up")
@click.option("--sellers", type=click.IntRange(1, 32), default=3, show_default=True)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice(("wasm", "process", "container", "vm")),
    help="What sellers offer; repeatable.  [default: all that work here]",
)
@click.option(
    "--egress",
    multiple=True,
    metavar="HOST:PORT",
    help="What sellers let jobs connect to, also *.DOMAIN:PORT or *:PORT; repeatable.",
)
@_state
@plain_options
@click.pass_obj
def up(
    settings: Settings,
    sellers: int,
    tiers: tuple[str, ...],
    egress: tuple[str, ...],
    state: Path | None,
) -> None:
    """Start it; it runs on when this command is done.

    Sellers attack their own sandboxes before they offer them, which takes a while.
    """
    folder = _folder(settings, state)
    with terminable():
        found = load(f"{_PART}:up")(folder, sellers, tiers=tiers, egress=egress)
    if settings.json:
        emit(found)
        return
    _print(found)
    note("next: let this shell use it:")
    note(f"  export LUMARIS_STATE={found['buyer']['state']}")
    note(f"  export LUMARIS_COORDINATOR_URL={found['coordinator']['url']}")
    note("  lumaris run python:3.12-wasi python -c 'print(6 * 7)'")


@devnet.command("status")
@_state
@plain_options
@click.pass_obj
def status(settings: Settings, state: Path | None) -> None:
    """Show what runs."""
    found = load(f"{_PART}:status")(_folder(settings, state))
    if settings.json:
        emit(found)
    else:
        _print(found)


@devnet.command("down")
@_state
@plain_options
@click.pass_obj
def down(settings: Settings, state: Path | None) -> None:
    """End it and remove its folder."""
    folder = _folder(settings, state)
    found = load(f"{_PART}:down")(folder)
    if settings.json:
        emit(found)
    else:
        click.echo("stopped")


def _folder(settings: Settings, state: Path | None) -> Path:
    if state is not None or settings.state is not None:
        return Path(state or settings.state or ".")
    import platformdirs

    return Path(platformdirs.user_state_dir("lumaris")) / "devnet"


def _print(found: dict[str, Any]) -> None:
    coordinator = found["coordinator"]
    rows = [("coordinator", coordinator, coordinator["url"])]
    for index, seller in enumerate(found["sellers"], start=1):
        rows.append((f"seller {index}", seller, peer_of(seller["peer"])))
    table(
        ("PROGRAM", "PID", "ALIVE", "ADDRESS"),
        [
            (name, program["pid"], "yes" if program["alive"] else "no", address)
            for name, program, address in rows
        ],
    )
    click.echo(f"state {clean(str(found['state']))}")
