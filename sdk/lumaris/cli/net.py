"""`lumaris netcheck` and `lumaris ping`: how this machine and its peers reach each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.options import CONTEXT, Settings, buyer_options
from lumaris.cli.output import emit, fields, note, peer_of

if TYPE_CHECKING:
    from lumaris.net import OpenOverlay
    from lumaris_overlay.ports import Ping

_ALONE_EXIT = 10
_PEERS_SHOWN = 5

_node = click.option("--node", is_flag=True, help="Look from the node that runs on this machine.")


@click.command("netcheck", context_settings=CONTEXT)
@_node
@buyer_options
@click.pass_obj
def netcheck(settings: Settings, node: bool) -> int:
    """Show who can reach this machine, and how.

    Exits with 10 when no peer answers.
    """
    import trio

    from lumaris import net

    found: dict[str, Any] = trio.run(net.netcheck, _opener(settings, node=node))
    if settings.json:
        emit(found)
    else:
        _print(found)
    return 0 if found["peers"] else _ALONE_EXIT


@click.command("ping", context_settings=CONTEXT)
@click.argument("peer", metavar="NODE")
@click.option("-c", "--count", type=click.IntRange(1, 1000), default=3, show_default=True)
@_node
@buyer_options
@click.pass_obj
def ping(settings: Settings, peer: str, count: int, node: bool) -> None:
    """Ask a peer whether it is there, and for its time.

    NODE is a peer id, or the end of one as `lumaris offers` shows it. Exits with 10 when it never
    answers.
    """
    import trio

    from lumaris import net

    def show(number: int, reply: Ping) -> None:
        if not settings.json:
            click.echo(
                f"{number}  {'relayed' if reply.relayed else 'direct'}"
                f"  {reply.round_trip_s * 1000:.2f} ms  clock {reply.clock_offset_s:+.3f} s"
            )

    asked = partial(
        net.ping, _opener(settings, node=node), peer.strip(), count=count, on_reply=show
    )
    found = trio.run(asked)
    if settings.json:
        emit(found)
    elif found["received"] < count:
        note(f"{count - found['received']} of {count} were not answered")


def _opener(settings: Settings, *, node: bool) -> OpenOverlay:
    from lumaris import daemon
    from lumaris import profile as profiles

    if not node:
        profile = profiles.load(state=settings.state, coordinator=settings.coordinator)
        return partial(daemon.attached, profile)
    from lumaris.cli.node import folder_of

    folder = folder_of(settings, None) / "overlay"
    return partial(daemon.running, folder, starts="lumaris node up")


def _print(found: dict[str, Any]) -> None:
    click.echo(found["status"])
    offset, peers = found["clock_offset_s"], found["peers"]
    shown = ", ".join(
        peer_of(info["peer"]) + (" (relayed)" if info["relayed"] else "")
        for info in peers[:_PEERS_SHOWN]
    )
    more = len(peers) - _PEERS_SHOWN
    clock = f"{offset:+.3f} s at {found['clock_peers']} peers" if offset is not None else "-"
    fields(
        [
            ("verdict", found["reachability"]),
            ("confirmed by", ", ".join(map(peer_of, found["confirmed_by"])) or "-"),
            ("addresses", ", ".join(found["addresses"]) or "-"),
            ("observed", ", ".join(found["observed"]) or "-"),
            ("relays", ", ".join(map(peer_of, found["relays"])) or "-"),
            ("peers", f"{len(peers)}: {shown}{f' and {more} more' if more > 0 else ''}"),
            ("clock", clock),
        ]
    )
    if found["next"]:
        note(f"next: {found['next']}")
