"""Two programs with links over a simulated network, and ways to harm what is between them."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from lumaris_overlay.links import LinkedOverlay, Timing, open_links
from lumaris_overlay.links.direct import Listener
from lumaris_overlay.links.link import Link
from lumaris_overlay.links.tls import TlsStream
from lumaris_overlay.simulated import SimulatedNetwork, SimulatedOverlay, open_network
from tests.overlay.world import KEYS, NETWORK, key_of, until

ECHO = "/lumaris/echo/1"
LOOPBACK = ("127.0.0.1", 0)


@dataclass
class Programs:
    """`buyer` opens streams, `seller` listens and answers."""

    network: SimulatedNetwork
    buyer_host: SimulatedOverlay
    seller_host: SimulatedOverlay
    buyer: LinkedOverlay
    seller: LinkedOverlay

    @property
    def link(self) -> Link:
        """The link as the buyer sees it."""
        [link] = self.buyer.links
        return link

    @property
    def far(self) -> Link:
        """The link as the seller sees it."""
        [link] = self.seller.links
        return link

    @property
    def listener(self) -> Listener:
        """The seller's direct listener."""
        assert self.seller.listener is not None
        return self.seller.listener

    async def direct(self) -> None:
        """Until both ends have moved to TLS."""
        await until(lambda: is_direct(self.link) and is_direct(self.far))


def is_direct(link: Link) -> bool:
    return link.carrier is not None and link.carrier.direct


def cut(link: Link) -> None:
    """Lose the TLS connection, as a middlebox would."""
    assert link.carrier is not None
    stream = link.carrier.stream
    assert isinstance(stream, TlsStream)
    with suppress(OSError):  # it may be cut already
        stream.sock.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def programs(
    *, listen: tuple[str, int] | None = LOOPBACK, timing: Timing | None = None
) -> AsyncGenerator[Programs]:
    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with (
            open_links(seller, listen=listen, timing=timing) as far,
            open_links(buyer, listen=None, answer=False, timing=timing) as near,
        ):
            yield Programs(network, buyer, seller, near, far)
