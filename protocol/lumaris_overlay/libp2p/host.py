"""The real network behind the port: a libp2p host with its gossip, index, dialling and streams."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from lumaris_overlay.directory import Directory
from lumaris_overlay.libp2p import build
from lumaris_overlay.libp2p.advert_exchange import AdvertExchange
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.overrides import ClosingTCP
from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import (
    AdvertEvent,
    OverlayStream,
    PeerInfo,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.tasks import background, shielded
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import KeyPair, PeerId

logger = logging.getLogger(__name__)

_OPEN_S = 10.0
_SHUTDOWN_S = 2.0


@dataclass(frozen=True)
class HostConfig:
    """What a host is started with. Port 0 lets the system choose."""

    key: KeyPair
    network: str
    coordinator_keys: frozenset[PeerId]
    listen_ip: str = "127.0.0.1"
    listen_port: int = 0
    bootstrap: tuple[str, ...] = ()
    state_dir: Path | None = None


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncGenerator[Libp2pOverlay]:
    """A listening host. Raises LumarisError `port_in_use` or `config_invalid`."""
    address = build.listen_address(config.listen_ip, config.listen_port)
    if config.listen_port:
        build.refuse_used_port(config.listen_ip, config.listen_port)
    transport = ClosingTCP()
    host = build.build_host(config.key, build.dialable, transport)
    try:
        async with host.run([address]), background() as nursery:
            overlay = Libp2pOverlay(config, host, nursery)
            try:
                await overlay.start()
                yield overlay
            finally:
                with shielded(_SHUTDOWN_S):
                    await overlay.stop()
    finally:
        with trio.CancelScope(shield=True):
            await transport.close_all()


class Libp2pOverlay:
    """A libp2p host; implements `ports.Overlay`."""

    def __init__(self, config: HostConfig, host: Any, nursery: trio.Nursery) -> None:
        self.host = host
        self._config = config
        self._nursery = nursery
        self._handlers = HandlerTable()
        state = config.state_dir
        self.directory = Directory(AdvertGate(config.network, config.coordinator_keys))
        self.connections = Connections(
            host,
            self.peer_id,
            nursery,
            PeerBook(state / "peers.json" if state is not None else None),
            bootstrap=config.bootstrap,
            advertised=self.directory.addresses,
            on_connected=self._greet,
        )
        self.exchange = AdvertExchange(
            host,
            config.network,
            self.directory,
            self.connections,
            nursery,
            new_stream=self._new_stream,
        )

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._config.key.peer_id

    async def start(self) -> None:
        """Join the topic, answer the index and begin to keep connections."""
        await self.exchange.start()
        self.connections.start()

    async def stop(self) -> None:
        """Close everything at once."""
        await self.connections.drop_all()
        await self.host.close()

    def _greet(self, peer: Any, dialled: bool) -> None:
        self.exchange.greet(peer, dialled)

    # --- the port ---

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our advert. Raises EnvelopeError when an honest peer would refuse it."""
        await self.exchange.publish(envelope)

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change."""
        return self.exchange.feed.follow(self.directory.events())

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        return await self.connections.connect(addresses)

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        await trio.lowlevel.checkpoint()
        return self.connections.infos()

    async def reachability(self) -> Reachability:
        """Where we listen and how many are connected."""
        await trio.lowlevel.checkpoint()
        addresses = tuple(str(address) for address in self.host.get_addrs())
        return Reachability(addresses, len(self.connections.live()))

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream; dials when not connected."""
        try:
            with trio.fail_after(_OPEN_S):
                await self.connections.reach(peer, addresses)
                return await self._new_stream(peer, protocol)
        except trio.TooSlowError:
            raise RemoteError("unreachable", f"The peer {peer} did not answer in time.") from None

    async def _new_stream(self, peer: str, protocol: str) -> Libp2pStream:
        try:
            stream = await self.host.new_stream(ID.from_base58(peer), [TProtocol(protocol)])
        except Exception as error:
            raise RemoteError(
                "unreachable", f"The peer {peer} does not answer {protocol}."
            ) from error
        return Libp2pStream(stream, protocol, self._nursery)

    @asynccontextmanager
    async def serve(self, protocol: str, handler: StreamHandler) -> AsyncGenerator[None]:
        """Answer streams of a protocol while the context lasts."""

        async def answer(net_stream: Any) -> None:
            await self._handlers.answer(Libp2pStream(net_stream, protocol, self._nursery))

        async with self._handlers.serve(protocol, handler):
            self.host.set_stream_handler(TProtocol(protocol), answer)
            try:
                yield
            finally:
                self.host.remove_stream_handler(TProtocol(protocol))
