"""`lumaris user`: which user a peer belongs to. A user sees what all of its peers do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from lumaris.cli.options import CONTEXT, Settings, buyer_options
from lumaris.cli.output import emit, fields
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris.profile import Profile
    from lumaris_protocol.coordinator_api import User

# What the codes' own hints say is for peers.
_HINTS: Final = {
    "unauthorized": "The key in LUMARIS_API_KEY has ended, or is of another coordinator; its"
    " operator makes another one: `lumaris coordinator user key`.",
    "forbidden": "The key in LUMARIS_API_KEY may only read; this needs one with the scope write:"
    " `lumaris coordinator user key NAME --scope read --scope write`.",
}


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

    with _key_refused():
        found = account.user_of(account.profile_of(settings), _api_key())
    _print(settings, found)


@user.command("link")
@buyer_options
@click.pass_obj
def link(settings: Settings) -> None:
    """Let the user of the key own the peer of the state folder, a buyer's or a node's.

    From then on the user sees its sessions, money and events; it cannot spend. The key needs the
    scope write.
    """
    from lumaris.cli import account

    with _key_refused():
        found = account.link_to_user(_peer_of(settings), _api_key())
    _print(settings, found)


@user.command("unlink")
@buyer_options
@click.pass_obj
def unlink(settings: Settings) -> None:
    """Take the peer of the state folder from the user of the key."""
    from lumaris.cli import account

    with _key_refused():
        found = account.unlink_from_user(_peer_of(settings), _api_key())
    _print(settings, found)


def _peer_of(settings: Settings) -> Profile:
    """A folder with a key: a mistyped one must not become a peer of its own."""
    from lumaris.cli import account
    from lumaris.disputes import NODE_KEY

    folder = settings.state
    if folder is None or folder.exists():
        profile = account.profile_of(settings)
        if profile.key_file.exists() or (profile.state / NODE_KEY).exists():
            return profile
        folder = profile.state
    raise LumarisError(
        "not_found",
        f"{folder} holds no peer's key.",
        hint="Name the folder of a buyer or a node: --state DIR.",
    )


@contextmanager
def _key_refused() -> Iterator[None]:
    """Say what a refusal means for the API key."""
    try:
        yield
    except LumarisError as error:
        if error.code not in _HINTS:
            raise
        raise LumarisError(error.code, error.message, hint=_HINTS[error.code]) from None


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
