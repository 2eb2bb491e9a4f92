"""The connections of a host: dialling, keeping enough of them, and telling of new ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.abc import INotifee
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as Libp2pPeerInfo
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from lumaris_overlay.libp2p.addresses import CIRCUIT, split_circuit
from lumaris_overlay.libp2p.circuit import Circuits, is_relayed
from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_overlay.ports import PeerInfo
from lumaris_protocol import limits
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

_DIAL_S = 6.0
_RELAY_AFTER_S = 1.0
_REDIAL_CHECK_S = 0.5
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.5, 60.0
# Below this many peers, remembered ones are dialled too: enough for a gossip mesh.
_PEERS_WANTED = 8

OnConnected = Callable[[Any, bool], None]  # the peer, and whether we dialled it


class ConnectionWatch(INotifee):
    """Tells of new connections; libp2p awaits each call, so each returns at once."""

    def __init__(
        self,
        connected: Callable[[Any], None],
        left: Callable[[Any], None] = lambda peer: None,
    ) -> None:
        self._connected, self._left = connected, left

    async def connected(self, network: Any, conn: Any) -> None:
        self._connected(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._left(conn.muxed_conn.peer_id)

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

    `advertised` gives the addresses in a peer's advert; `circuits` dials through relays; nobody is
    dialled unless `may_dial`.
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
        circuits: Circuits | None = None,
        may_dial: Callable[[], bool] = lambda: True,
        on_left: Callable[[Any], None] = lambda peer: None,
    ) -> None:
        self._host, self._me, self._nursery, self._book = host, me, nursery, book
        self._bootstrap, self._advertised = tuple(bootstrap), advertised
        self._on_connected, self._circuits = on_connected, circuits
        self._may_dial, self._on_left = may_dial, on_left
        self._hurried = trio.Event()
        self._dialling: set[str] = set()
        self._retry: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        """Begin to watch and to keep connections."""
        self._host.get_network().register_notifee(ConnectionWatch(self._greet, self._part))
        self._nursery.start_soon(self._keep_connected)

    def _greet(self, connection: Any) -> None:
        peer = connection.muxed_conn.peer_id
        self._on_connected(peer, str(peer) in self._dialling)

    def hurry(self) -> None:
        """Look at once whom to dial."""
        self._hurried.set()

    def _part(self, peer: Any) -> None:
        if peer not in self.live():
            self._on_left(peer)

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
        direct: list[str] = []
        circuits: list[str] = []
        for address in dict.fromkeys(known):
            named = "/p2p/" in address.rpartition(CIRCUIT)[2]
            full = address if named else address + suffix
            if full.endswith(suffix):
                (circuits if CIRCUIT in full else direct).append(full)
        if not await self._first_of(direct, circuits):
            raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")

    async def _first_of(self, direct: Sequence[str], circuits: Sequence[str]) -> bool:
        """Dial one after the other; whether one answered.

        A relay is the longer way, and is tried when the direct ones failed or keep us waiting.
        """
        tried = trio.Event()
        answered = False

        async def attempt(addresses: Sequence[str]) -> None:
            nonlocal answered
            for address in addresses:
                if await self.dial(address):
                    answered = True
                    nursery.cancel_scope.cancel()
                    return

        async def attempt_later() -> None:
            with trio.move_on_after(_RELAY_AFTER_S):
                await tried.wait()
            await attempt(circuits)

        async with trio.open_nursery() as nursery:
            if circuits:
                nursery.start_soon(attempt_later)
            await attempt(direct)
            tried.set()
        return answered

    def infos(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        return tuple(
            PeerInfo(PeerId(str(peer)), self.addresses_of(peer), is_relayed(self._host, peer))
            for peer in self.live()
        )

    def live(self) -> list[Any]:
        """The libp2p ids of the peers we are connected to."""
        connections = self._host.get_network().connections
        return [
            peer for peer, held in list(connections.items()) if any(not c.is_closed for c in held)
        ]

    def held(self, peer: str) -> list[int]:
        """Which connections to a peer are open, to see whether they are the same later."""
        found = self._host.get_network().connections
        return [
            id(connection)
            for known, connections in list(found.items())
            if str(known) == peer
            for connection in connections
            if not connection.is_closed
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
        if not self._may_dial():
            return False
        if CIRCUIT in address:
            return await self._dial_circuit(address)
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

    async def _dial_circuit(self, address: str) -> bool:
        parts = split_circuit(address)
        if parts is None or self._circuits is None:
            return False
        try:
            relay, target = ID.from_base58(parts[0].rpartition("/")[2]), ID.from_base58(parts[1])
        except Exception:
            return False
        if self._me in (str(relay), str(target)):
            return False
        if target in self.live():
            return True
        if not await self.dial(parts[0]):
            return False
        self._dialling.add(str(target))
        try:
            with trio.fail_after(_DIAL_S):
                await self._circuits.dial(relay, target)
        except (RemoteError, trio.TooSlowError) as error:
            logger.debug("dial address=%s error=%r", address, error)
            return target in self.live()
        finally:
            self._dialling.discard(str(target))
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
            if not self._may_dial():
                await self._pause()
                continue
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
            await self._pause()

    async def _pause(self) -> None:
        with trio.move_on_after(_REDIAL_CHECK_S):
            await self._hurried.wait()
        self._hurried = trio.Event()

    async def _redial(self, peer: str, addresses: list[str], delay: float) -> None:
        for address in dict.fromkeys(addresses):
            if await self.dial(address):
                return
        due = trio.current_time() + delay * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
        self._retry[peer] = (delay, due)
