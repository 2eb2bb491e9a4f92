"""`lumaris coordinator keys|operator|user`: the coordinator's own keys, who may operate it, and
whom it makes an account for."""

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
    found = _command("show")(_chosen(settings, state, data=False))
    if settings.json:
        emit(found)
        return
    for key in found["keys"]:
        until = time.strftime("%Y-%m-%d", time.gmtime(key["not_after"]))
        since = f"from {_moment(key['not_before'])} " if key["state"] == "waiting" else ""
        click.echo(f"{key['peer']}  {key['state']:<8} {since}until {until}")
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
    """Add a signing key. Certificates are renewed within a day, so by then everybody knows it.

    While a key waits to take over, another one is refused unless it signs at once.
    """
    wait: dict[str, Any] = {} if after is None else {"after_s": after}
    if now:
        wait = {"after_s": 0}
    found = _command("rotate")(_chosen(settings, state, data=False), root, **wait)
    if settings.json:
        emit(found)
        return
    click.echo(found["peer"])
    note(f"it signs from {_moment(found['starts_at'])}")
    for key in found["waiting"]:
        note(
            f"{key['peer']} was added before and takes over from it at {_moment(key['starts_at'])};"
        )
        note("if somebody else may have read that key, revoke it as well")


def _moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


@keys.command("revoke")
@click.argument("peer")
@_root_option
@_state_option
@plain_options
@click.pass_obj
def revoke(settings: Settings, peer: str, root: Path, state: Path | None) -> None:
    """Take a signing key back: what it signed counts no more. Add another one first.

    Everybody whose certificate it signed registers again, without anybody's hand, in some minutes.
    """
    _command("revoke")(_chosen(settings, state, data=False), root, peer)
    if settings.json:
        emit({"revoked": peer})
        return
    note(f"{peer} is revoked; a running coordinator follows within a minute")
    note("buyers and nodes register again by themselves within five minutes after that; until")
    note("then purchases may fail with not_certified or no_sellers")


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


@operator.command("list")
@_state_option
@plain_options
@click.pass_obj
def list_operators(settings: Settings, state: Path | None) -> None:
    """Show the operators and their API keys, without the texts of these."""
    found = _command("operators")(_chosen(settings, state))
    if settings.json:
        emit(found)
        return
    for one in found:
        click.echo(f"{one['name']}  {one['user']}")
        for key in one["keys"]:
            ends = time.strftime("%Y-%m-%d", time.gmtime(key["expires_at"]))
            click.echo(f"  {key['id']}  {key['name']}  until {ends}")


@operator.command("revoke")
@click.argument("name")
@_state_option
@plain_options
@click.pass_obj
def revoke_operator(settings: Settings, name: str, state: Path | None) -> None:
    """End every API key of an operator at once."""
    found = _command("revoke_operator")(_chosen(settings, state), name)
    if settings.json:
        emit(found)
        return
    note(f"{found['keys']} keys of {name} have ended")


@operator.command("renew")
@click.argument("name")
@_state_option
@plain_options
@click.pass_obj
def renew_operator(settings: Settings, name: str, state: Path | None) -> None:
    """End every API key of an operator and print one in their place, this once."""
    found = _command("renew_operator")(_chosen(settings, state), name)
    if settings.json:
        emit(found)
        return
    click.echo(found["key"])
    note(f"the keys that {name} had have ended; this one ends in 90 days")


@click.group("user", context_settings=CONTEXT)
def user() -> None:
    """Users that the operator makes; they need no password, an API key is enough."""


_scope_option = click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "write"]),
    multiple=True,
    help="What the key may do; repeatable.",
)


@user.command("create")
@click.argument("name")
@_scope_option
@_state_option
@plain_options
@click.pass_obj
def create_user(settings: Settings, name: str, scopes: tuple[str, ...], state: Path | None) -> None:
    """Make a user and print its API key, this once. It may read and write unless told."""
    chosen = _chosen(settings, state)
    _print_key(settings, name, _command("create_user")(chosen, name, scopes or ("read", "write")))


@user.command("key")
@click.argument("name")
@_scope_option
@_state_option
@plain_options
@click.pass_obj
def create_key(settings: Settings, name: str, scopes: tuple[str, ...], state: Path | None) -> None:
    """Print another API key for a user. It may only read unless told."""
    chosen = _chosen(settings, state)
    _print_key(settings, name, _command("create_key")(chosen, name, scopes or ("read",)))


def _print_key(settings: Settings, name: str, found: dict[str, Any]) -> None:
    if settings.json:
        emit(found)
        return
    click.echo(found["key"])
    note(f"user {name} is {found['user']}; the key ends in 90 days")


def _command(name: str) -> Any:
    return load(f"{_COMMANDS}:{name}", extra="coordinator")


def _chosen(settings: Settings, state: Path | None, *, data: bool = True) -> Any:
    from lumaris.cli.coordinator import chosen_settings

    return chosen_settings(settings, state, data=data)
