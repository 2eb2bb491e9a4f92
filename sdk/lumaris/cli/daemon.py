"""`lumaris daemon`: the buyer's overlay process, which commands share and start by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lumaris.cli.options import CONTEXT, SECONDS, Settings, buyer_options, local_options
from lumaris.cli.output import emit, fields, note, size_of, time_of


@click.group("daemon", context_settings=CONTEXT)
def daemon() -> None:
    """Keep this machine on the network between commands.

    Commands share one overlay process for each state folder. It starts when one needs it and
    leaves some minutes after the last one.
    """


@daemon.command("up")
@click.option("--linger", type=SECONDS, help="How long it stays unused.  [default: 3m]")
@buyer_options
@click.pass_obj
def up(settings: Settings, linger: int | None) -> None:
    """Start it, unless it runs."""
    import trio

    from lumaris import daemon as daemons
    from lumaris import profile as profiles
    from lumaris.cli.work import terminable

    profile = profiles.load(
        state=settings.state, coordinator=settings.coordinator, overlay_linger_s=linger
    )
    with terminable():
        found = trio.run(daemons.up, profile)
    if settings.json:
        emit(found)
        return
    click.echo(f"{'started' if found['started'] else 'already running'} {found['pid']}")
    if linger is not None and not found["started"] and linger != found["linger_s"]:
        note(f"it still leaves {time_of(found['linger_s'])} after its last use; --linger needs")
        note("`lumaris daemon down` first")


@daemon.command("status")
@local_options
@click.pass_obj
def status(settings: Settings) -> None:
    """Show what it does and whom it knows."""
    import trio

    from lumaris import daemon as daemons

    found: dict[str, Any] = trio.run(daemons.status, _folder(settings))
    if settings.json:
        emit(found)
        return
    click.echo(found["status"])
    fields(
        [
            ("pid", found["pid"]),
            ("uptime", time_of(found["uptime_s"])),
            ("memory", f"{size_of(found['memory_bytes'])} of {size_of(found['memory_bytes_max'])}"),
            ("peer", found["peer"]),
            ("network", found["network"]),
            ("peers", found["peers"]),
            ("adverts", found["adverts"]),
            ("addresses", ", ".join(found["addresses"]) or "-"),
            ("linger", time_of(found["linger_s"]) if found["linger_s"] is not None else "-"),
            ("socket", found["socket"]),
        ]
    )


@daemon.command("down")
@local_options
@click.pass_obj
def down(settings: Settings) -> None:
    """End it. The next command that needs it starts it again."""
    import trio

    from lumaris import daemon as daemons

    found = trio.run(daemons.down, _folder(settings))
    if settings.json:
        emit(found)
        return
    click.echo("stopped" if found["stopped"] else "was not running")
    if found["started_again"]:
        note("a program that uses it has started it again")


def _folder(settings: Settings) -> Path:
    from lumaris.cli.local import state_folder
    from lumaris.profile import Profile

    return Profile(state_folder(settings), "").overlay
