"""The connections of a host: dialling, keeping enough of them, and telling of new ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.abc import INotifee
from libp2p.peer.peerinfo import PeerInfo as Libp2pPeerInfo
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_overlay.ports import PeerInfo
from lumaris_protocol import limits
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

_DIAL_S = 6.0
_REDIAL_CHECK_S = 0.5
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.5, 60.0
# Below this many peers, remembered ones are dialled too: enough for a gossip mesh.
_PEERS_WANTED = 8

OnConnected = Callable[[Any, bool], None]  # the peer, and whether we dialled it


class _ConnectionWatch(INotifee):
    """Tells of new connections; libp2p awaits each call, so each returns at once."""

    def __init__(self, connected: Callable[[Any], None]) -> None:
        self._connected = connected

    async def connected(self, network: Any, conn: Any) -> None:
        self._connected(conn.muxed_conn.peer_id)

    async def disconnected(self, network: Any, conn: Any) -> None:
        pass

    async def opened_stream(self, network: Any, stream: Any) -> None:
        pass

    async def closed_stream(self, network: Any, stream: Any) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Any) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        pass


class Connections:
    """Who we are connected to. `on_connected` is called at each new connection; it returns at once.

    `advertised` gives the addresses in a peer's advert.
    """

    def __init__(
        self,
        host: Any,
        me: PeerId,
        nursery: trio.Nursery,
        book: PeerBook,
        *,
        bootstrap: Sequence[str],
        advertised: Callable[[str], tuple[str, ...]],
        on_connected: OnConnected,
    ) -> None:
        self._host, self._me, self._nursery, self._book = host, me, nursery, book
        self._bootstrap, self._advertised = tuple(bootstrap), advertised
        self._on_connected = on_connected
        self._dialling: set[str] = set()
        self._retry: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        """Begin to watch and to keep connections."""
        self._host.get_network().register_notifee(_ConnectionWatch(self._greet))
        self._nursery.start_soon(self._keep_connected)

    def _greet(self, peer: Any) -> None:
        self._on_connected(peer, str(peer) in self._dialling)

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        answered = 0

        async def one(address: str) -> None:
            nonlocal answered
            answered += await self.dial(address)

        async with trio.open_nursery() as nursery:
            for address in addresses[: limits.PEERS_REMEMBERED_MAX]:
                nursery.start_soon(one, address)
        return answered

    async def reach(self, peer: str, addresses: Sequence[str]) -> None:
        """Be connected to a peer. Raises RemoteError `unreachable`."""
        if any(str(known) == peer for known in self.live()):
            return
        suffix = f"/p2p/{peer}"
        known = (*addresses, *self._advertised(peer), *self._book.addresses().get(peer, ()))
        for address in dict.fromkeys(known):
            full = address if "/p2p/" in address else address + suffix
            if full.endswith(suffix) and await self.dial(full):
                return
        raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")

    def infos(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        return tuple(PeerInfo(PeerId(str(peer)), self.addresses_of(peer)) for peer in self.live())

    def live(self) -> list[Any]:
        """The libp2p ids of the peers we are connected to."""
        connections = self._host.get_network().connections
        return [
            peer for peer, held in list(connections.items()) if any(not c.is_closed for c in held)
        ]

    def addresses_of(self, peer: Any) -> tuple[str, ...]:
        """Where a peer says it listens."""
        try:
            found = self._host.get_peerstore().addrs(peer)
        except Exception:
            return ()
        suffix = f"/p2p/{peer}"
        texts = {str(a) if str(a).endswith(suffix) else f"{a}{suffix}" for a in found}
        return tuple(sorted(t for t in texts if "/0.0.0.0/" not in t))[: limits.ADDRESSES_MAX]

    def remember(self, peer: Any) -> None:
        """Keep where a peer was reached for the next start."""
        self._book.remember(str(peer), self.addresses_of(peer))

    async def dial(self, address: str) -> bool:
        """Connect to one address; whether a connection to its peer is up afterwards."""
        try:
            info = info_from_p2p_addr(Multiaddr(address))
        except Exception:
            return False
        peer = info.peer_id
        if str(peer) == self._me:
            return False
        if peer in self.live():
            return True
        network = self._host.get_network()
        self._dialling.add(str(peer))
        try:
            # Of several TCP addresses libp2p tries one, so it is given one at a time; and it
            # refuses a peer for a minute after a failure, while our back-off decides that here.
            self._host.get_peerstore().clear_addrs(peer)
            network.unblock_peer(peer)
            with trio.fail_after(_DIAL_S):
                await self._host.connect(Libp2pPeerInfo(peer, info.addrs))
        except Exception as error:
            logger.debug("dial address=%s error=%r", address, error)
            return peer in self.live()
        finally:
            self._dialling.discard(str(peer))
        return True

    async def drop(self, peer: Any) -> None:
        """Close the connection to a peer. Never raises."""
        try:
            await self._host.get_network().close_peer(peer)
        except Exception as error:
            logger.debug("closing peer=%s error=%r", peer, error)

    async def drop_all(self) -> None:
        """Close all at once; libp2p alone takes 0.2 s for each."""
        async with trio.open_nursery() as nursery:
            for peer in list(self._host.get_network().connections):
                nursery.start_soon(self.drop, peer)

    async def _keep_connected(self) -> None:
        while True:
            now = trio.current_time()
            connected = {str(peer) for peer in self.live()}
            wanted = {address.rpartition("/p2p/")[2]: [address] for address in self._bootstrap}
            if len(connected) < _PEERS_WANTED:
                for peer, addresses in self._book.addresses().items():
                    wanted.setdefault(peer, []).extend(addresses)
            for peer, targets in wanted.items():
                if peer in connected:
                    self._retry.pop(peer, None)
                    continue
                delay, due = self._retry.get(peer, (_BACKOFF_S_MIN / 2, now))
                if due > now or peer in self._dialling:
                    continue
                delay = min(delay * 2, _BACKOFF_S_MAX)
                # Jitter spreads the return of a whole market after a bootstrap peer's restart.
                due = now + _DIAL_S + delay * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
                self._retry[peer] = (delay, due)
                self._nursery.start_soon(self._redial, peer, targets, delay)
            await trio.sleep(_REDIAL_CHECK_S)

    async def _redial(self, peer: str, addresses: list[str], delay: float) -> None:
        for address in dict.fromkeys(addresses):
            if await self.dial(address):
                return
        due = trio.current_time() + delay * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
        self._retry[peer] = (delay, due)
