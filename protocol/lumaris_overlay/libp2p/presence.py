"""How this host is present in the network: what it announces, who can dial it, and through whom.

It composes the self-test, the relays (ours and the service to others), hole punching and mDNS.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.peer.id import ID

from lumaris_overlay.libp2p import addresses
from lumaris_overlay.libp2p.build import own_addresses
from lumaris_overlay.libp2p.circuit import Circuits, is_relayed, remote_ip
from lumaris_overlay.libp2p.connections import ConnectionWatch
from lumaris_overlay.libp2p.mdns import run_mdns
from lumaris_overlay.libp2p.punch import Punching
from lumaris_overlay.libp2p.reach import Announcer, Reach
from lumaris_overlay.libp2p.relay import RelayKeeper, RelayLimits, RelayService
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import Reachability
from lumaris_protocol.limits import ADDRESSES_MAX

_MDNS_DIALS_MAX = 8
_SEEN_MAX = 2  # a peer may lie about it; most name the same


@dataclass(frozen=True)
class ReachConfig:
    """What the owner wants others to be told, and what this host does for others."""

    announce: tuple[str, ...] = ()
    relay: RelayLimits | None = None
    mdns: bool = False


class Presence:
    """One host's presence. `circuits` dials through relays; `met` is told of new members.

    `admitted` says whether a peer is a member, `dial` connects to one address, `seen_as` is where
    our connections seem to come from.
    """

    def __init__(
        self,
        host: Any,
        announcer: Announcer,
        nursery: trio.Nursery,
        *,
        network: str,
        config: ReachConfig,
        admitted: Callable[[str], bool],
        new_stream: Callable[[str, str], Awaitable[Libp2pStream]],
        dial: Callable[[str], Awaitable[bool]],
        seen_as: Callable[[], tuple[str, ...]],
    ) -> None:
        self._host, self._announcer, self._nursery = host, announcer, nursery
        self._network, self._config = network, config
        self._admitted, self._dial, self._seen_as = admitted, dial, seen_as
        self._mdns_dials = trio.CapacityLimiter(_MDNS_DIALS_MAX)
        self.keeper = RelayKeeper(
            host,
            candidates=self._members_in_reach,
            remote_ip=self._remote_ip,
            wanted=lambda: announcer.verdict == "private",
        )
        announcer.circuits = self.keeper.circuits
        self.circuits = Circuits(host, reserved=self.keeper.holds)
        self.reach = Reach(
            host,
            announcer,
            nursery,
            admitted=admitted,
            remote_ip=self._remote_ip,
            testers=self._members_in_reach,
            new_stream=new_stream,
            changed=self.keeper.wake,
        )
        self.punching = Punching(
            host,
            nursery,
            admitted=admitted,
            candidates=self._candidates,
            listening=self._listening,
            is_relayed=lambda peer: is_relayed(host, peer),
        )
        self.service: RelayService | None = None
        if config.relay is not None:
            self.service = RelayService(
                host, admitted=admitted, remote_ip=self._remote_ip, limits=config.relay
            )

    def start(self) -> None:
        """Answer others and begin to look after ourselves."""
        watch = ConnectionWatch(self._met, self.keeper.lost)
        self._host.get_network().register_notifee(watch)
        self.circuits.start()
        self.reach.start()
        self.punching.start()
        if self.service is not None:
            self.service.start()
        self._nursery.start_soon(self.keeper.run)
        if self._config.mdns:
            self._nursery.start_soon(self._tell_neighbours)

    def reachability(self, peers: int) -> Reachability:
        """Who can reach us and how; `peers` are connected."""
        return Reachability(
            addresses=tuple(str(address) for address in self._host.get_addrs()),
            peers=peers,
            verdict=self._announcer.verdict,
            confirmed_by=self._announcer.confirmed_by(),
            relays=self.keeper.relays(),
            observed=self._announcer.observed(),
        )

    def met(self, peer: Any) -> None:
        """A member is connected, by whatever way."""
        self.reach.met(peer)
        self.keeper.wake()
        for connection in self._host.get_network().get_connections(peer):
            self.punching.met(connection)

    def _met(self, connection: Any) -> None:
        peer = connection.muxed_conn.peer_id
        if self._admitted(str(peer)):
            self.met(peer)

    def _members_in_reach(self) -> list[ID]:
        """Members that we are connected to without a relay, those met first at the front."""
        connected = list(self._host.get_network().connections)
        return [
            peer
            for peer in connected
            if self._remote_ip(peer) is not None and self._admitted(str(peer))
        ]

    def _remote_ip(self, peer: Any) -> str | None:
        return remote_ip(self._host, peer)

    def _candidates(self) -> tuple[str, ...]:
        """Where we may appear outside: as the self-test saw it, or before that, as peers said."""
        tested = self._announcer.observed()
        if tested:
            return tested
        found: dict[str, None] = {}
        listening = self._listening()
        for text in self._seen_as()[:_SEEN_MAX]:
            seen = addresses.endpoint_of(text)
            if seen is not None:
                found |= {addresses.address_of(seen[0], port): None for _, port in listening}
        return tuple(found)

    def _listening(self) -> list[tuple[str, int]]:
        texts = map(str, self._host.get_transport_addrs())
        return [found for found in map(addresses.endpoint_of, texts) if found is not None]

    async def _tell_neighbours(self) -> None:
        """Tell the local network where we listen there, and dial whom we hear."""
        me = self._host.get_id()
        ips, told = [], []
        for ip, port in self._listening():
            for own in own_addresses() if addresses.scope_of(ip) == "any" else [ip]:
                ips.append(own)
                told.append(f"{addresses.address_of(own, port)}/p2p/{me}")

        async def dial(found: list[str]) -> None:
            async with self._mdns_dials:
                for address in found[:ADDRESSES_MAX]:
                    if await self._dial(address):
                        return

        def heard(found: list[str]) -> None:
            # Many names cost their sender nothing: no more wait than are dialled at once.
            if self._mdns_dials.statistics().tasks_waiting < _MDNS_DIALS_MAX:
                self._nursery.start_soon(dial, found)

        await run_mdns(self._network, sorted(set(ips)), told, heard)
