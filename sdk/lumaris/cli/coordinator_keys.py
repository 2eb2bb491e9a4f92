"""`lumaris coordinator keys|operator`: the coordinator's own keys, and who may operate it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import click

from lumaris.cli.options import CONTEXT, SECONDS, Settings, load, plain_options
from lumaris.cli.output import emit, note

_COMMANDS: Final = "lumaris_coordinator.identity.commands"

_state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of its keys, its configuration and its data.",
)
_root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    required=True,
    help="The root key; it was made as keys/root.key in the folder and belongs offline.",
)


@click.group("keys", context_settings=CONTEXT)
def keys() -> None:
    """The keys that the coordinator signs with.

    Old ones stay valid for what they signed; a root key, kept offline, signs the list of them.
    """


@keys.command("list")
@_state_option
@plain_options
@click.pass_obj
def list_keys(settings: Settings, state: Path | None) -> None:
    """Show the keys and which of them signs now."""
    found = _command("show")(_chosen(settings, state))
    if settings.json:
        emit(found)
        return
    for key in found["keys"]:
        until = time.strftime("%Y-%m-%d", time.gmtime(key["not_after"]))
        click.echo(f"{key['peer']}  {key['state']:<8} until {until}")
    note(f"root {found['root']}, list number {found['seq']}")
    if found["root_here"]:
        note("the root key still lies in the folder: move keys/root.key to a place offline")


@keys.command("rotate")
@_root_option
@click.option("--after", type=SECONDS, help="How long until it takes over.  [default: 25h]")
@click.option("--now", is_flag=True, help="Take over at once; programs that are up may refuse it.")
@_state_option
@plain_options
@click.pass_obj
def rotate(
    settings: Settings, root: Path, after: int | None, now: bool, state: Path | None
) -> None:
    """Add a signing key. Certificates are renewed within a day, so by then everybody knows it."""
    wait: dict[str, Any] = {} if after is None else {"after_s": after}
    if now:
        wait = {"after_s": 0}
    found = _command("rotate")(_chosen(settings, state), root, **wait)
    if settings.json:
        emit(found)
        return
    click.echo(found["peer"])
    note(time.strftime("it signs from %Y-%m-%d %H:%M:%S UTC", time.gmtime(found["starts_at"])))


@keys.command("revoke")
@click.argument("peer")
@_root_option
@_state_option
@plain_options
@click.pass_obj
def revoke(settings: Settings, peer: str, root: Path, state: Path | None) -> None:
    """Take a signing key back: what it signed counts no more. Add another one first."""
    _command("revoke")(_chosen(settings, state), root, peer)
    if settings.json:
        emit({"revoked": peer})
        return
    note(f"{peer} is revoked; a running coordinator follows within a minute")


@click.group("operator", context_settings=CONTEXT)
def operator() -> None:
    """Who may operate the coordinator over HTTP."""


@operator.command("create")
@click.argument("name")
@_state_option
@plain_options
@click.pass_obj
def create(settings: Settings, name: str, state: Path | None) -> None:
    """Make an operator and print its API key, this once."""
    found = _command("create_operator")(_chosen(settings, state), name)
    if settings.json:
        emit(found)
        return
    click.echo(found["key"])
    note(f"operator {name} is {found['user']}; the key ends in 90 days, rotate it before")


def _command(name: str) -> Any:
    return load(f"{_COMMANDS}:{name}", extra="coordinator")


def _chosen(settings: Settings, state: Path | None) -> Any:
    from lumaris.cli.coordinator import _folder, _settings

    return _settings(_folder(settings, state), {})
