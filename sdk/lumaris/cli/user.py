"""`lumaris user`: which user a peer belongs to. A user sees what all of its peers do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.options import CONTEXT, Settings, buyer_options
from lumaris.cli.output import emit, fields
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_protocol.coordinator_api import User


@click.group("user", context_settings=CONTEXT)
def user() -> None:
    """Say whose this peer is, with a user's API key.

    The environment's LUMARIS_API_KEY holds the key: it belongs neither on a command line nor in a
    process list.
    """


@user.command("show")
@buyer_options
@click.pass_obj
def show(settings: Settings) -> None:
    """Show the user of the key and its peers."""
    from lumaris.cli import account

    _print(settings, account.user_of(account.profile_of(settings), _api_key()))


@user.command("link")
@buyer_options
@click.pass_obj
def link(settings: Settings) -> None:
    """Let the user of the key own the peer of the state folder, a buyer's or a node's.

    From then on the user sees its sessions, money and events; it cannot spend.
    """
    from lumaris.cli import account

    _print(settings, account.link_to_user(account.profile_of(settings), _api_key()))


@user.command("unlink")
@buyer_options
@click.pass_obj
def unlink(settings: Settings) -> None:
    """Take the peer of the state folder from the user of the key."""
    from lumaris.cli import account

    _print(settings, account.unlink_from_user(account.profile_of(settings), _api_key()))


def _api_key() -> str:
    key = os.environ.get("LUMARIS_API_KEY", "")
    if not (key.isascii() and key.isprintable() and key):
        raise LumarisError(
            "unauthorized",
            "LUMARIS_API_KEY holds no API key.",
            hint="The coordinator's operator makes one: `lumaris coordinator user create`.",
        )
    return key


def _print(settings: Settings, found: User) -> None:
    if settings.json:
        record: dict[str, Any] = {
            "user": found.user,
            "name": found.name,
            "operator": found.operator,
            "peers": found.peers,
        }
        emit(record)
        return
    fields([("user", found.user), ("name", found.name), *(("peer", one) for one in found.peers)])
