"""Builds a libp2p host from the corrected parts: TCP, Noise and Yamux only, all limits set."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr import new_resource_manager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.manager import TransportManager
from multiaddr import Multiaddr

from lumaris_overlay.libp2p import overrides
from lumaris_overlay.libp2p.admission import Admission, AdmittingNoise
from lumaris_overlay.libp2p.upgrader import NotingUpgrader
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import OVERLAY_CONNECTIONS_MAX


def connection_config() -> ConnectionConfig:
    """The connection settings, each for a measured reason."""
    return ConnectionConfig(
        max_connections=OVERLAY_CONNECTIONS_MAX,
        high_watermark=OVERLAY_CONNECTIONS_MAX,
        # Above 0 libp2p dials every address it ever heard of.
        min_connections=0,
        low_watermark=0,
        # Above 1 every successful dial sleeps a quarter of a second.
        max_connections_per_peer=1,
        dial_timeout=5.0,
        # It pings one connection after the other: the first that hangs blinds it. See `health`.
        enable_health_monitoring=False,
    )


def build_host(
    key: KeyPair,
    announce: Any,
    transport: overrides.ClosingTCP,
    admission: Admission,
    banned: Callable[[str], bool] = lambda peer: False,
) -> overrides.GuardedHost:
    """A host for this key, not yet listening. `announce` maps listen addresses to told ones."""
    overrides.install()
    pair = create_new_key_pair(key.seed)
    peer = ID.from_pubkey(pair.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer, pair)
    # Noise alone: libp2p's default set also offers plaintext, where anyone is whoever they say.
    noise = AdmittingNoise(
        pair, noise_privkey=create_x25519().private_key, admission=admission, banned=banned
    )
    upgrader = NotingUpgrader(
        secure_transports_by_protocol={NOISE: noise},
        muxer_transports_by_protocol={TProtocol(YAMUX): overrides.WholeFrameYamux},
    )
    swarm = overrides.ReleasingSwarm(
        peer,
        peerstore,
        upgrader,
        transports=[transport],
        retry_config=RetryConfig(max_retries=0),  # we retry ourselves, with back-off
        connection_config=connection_config(),
        transport_manager=TransportManager(port_demuxers={}),
    )
    swarm.auto_connector = overrides.NoAutoConnector(swarm=swarm)
    swarm.set_resource_manager(new_resource_manager())
    return overrides.GuardedHost(
        admitted=admission.admitted,
        network=swarm,
        addrs_factory=announce,
        disable_identify_address_discovery=True,
    )


def refuse_used_port(ip: str, port: int) -> None:
    """Raise LumarisError `port_in_use` when something listens there.

    libp2p's listener shares a port silently: two hosts would then each get half of the dials.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the listener: sockets in TIME_WAIT do not count, a listening one does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            code = "port_in_use" if error.errno == errno.EADDRINUSE else "config_invalid"
            raise LumarisError(code, f"Cannot listen at {ip}:{port}: {error.strerror}.") from None


def listen_address(ip: str, port: int) -> Multiaddr:
    """The multiaddr to listen on. Raises LumarisError `config_invalid`."""
    try:
        version = ipaddress.ip_address(ip).version
    except ValueError:
        raise LumarisError("config_invalid", f"{ip!r} is not an IP address.") from None
    return Multiaddr(f"/ip{version}/{ip}/tcp/{port}")


def own_addresses() -> list[str]:
    """The IPs of this machine from which it reaches the world, or its loopback without one."""
    # Nothing is sent: connecting a datagram socket only chooses the outgoing address.
    found = [local_ip(towards) for towards in ("192.0.2.1", "2001:db8::1")]
    return [ip for ip in found if ip is not None] or ["127.0.0.1"]


def local_ip(towards: str) -> str | None:
    """The IP of this machine from which it would reach another; None without a route."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
