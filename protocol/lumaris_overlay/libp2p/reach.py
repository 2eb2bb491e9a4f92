"""Who can reach us and how: dial-backs by other peers, what they see of us, and what we announce.

`/lumaris/reach/1`: the asker sends a HEADER {nonce, ports}. The asked peer dials those ports on the
IP that it sees the asker's own connection come from, each with a new TCP connection and a Noise
handshake that must show the asker's key, and answers a HEADER {nonce, observed, worked}. The
request carries no address, so nobody can have a third party dialled. The asker counts a port only
when that peer's handshake really arrived here, so a peer cannot talk us into a place where nobody
reaches us.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from msgspec import Meta
from multiaddr import Multiaddr

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.libp2p import addresses
from lumaris_overlay.libp2p.build import local_ip, own_addresses
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.libp2p.upgrader import NotingUpgrader
from lumaris_overlay.ports import Verdict
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import limits, protocols
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

PROTOCOL = protocols.REACH
_DIAL_S = 3.0
_EXCHANGE_S = 8.0
# A handshake that the other side has finished reaches us within its flight.
_ARRIVAL_S = 2.0
_DIALS_AT_ONCE = 8
_TESTERS = 2
_ROUNDS = 2
# The first test waits this long, so that more than one peer can be asked.
_SETTLE_S = 0.5
_AGAIN_S_MIN, _AGAIN_S_MAX = 5.0, 600.0
_PLACES_MAX = 16

Port = Annotated[int, Meta(ge=1, le=65_535)]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dial me back at these ports."""

    nonce: Annotated[str, Meta(max_length=32)]
    ports: Annotated[tuple[Port, ...], Meta(min_length=1, max_length=limits.REACH_PORTS_MAX)]


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where I see you, and which ports answered there with your key."""

    nonce: Annotated[str, Meta(max_length=32)]
    observed: Annotated[str, Meta(max_length=45)]
    worked: Annotated[tuple[Port, ...], Meta(max_length=limits.REACH_PORTS_MAX)] = ()


@dataclass(frozen=True)
class Finding:
    """What one peer found: where it sees us, and which ports it reached.

    `translated` when we leave this machine from another IP than the one it sees; `tester` is the
    IP where we see that peer.
    """

    peer: PeerId
    ip: str
    worked: tuple[int, ...]
    translated: bool = False
    tester: str = ""

    @property
    def outside(self) -> bool:
        """Whether it tells where the world sees us: no neighbour can know that."""
        return addresses.scope_of(self.ip) == "public" and not self.neighbour

    @property
    def neighbour(self) -> bool:
        """Whether the peer is in our own network."""
        return bool(self.tester) and addresses.scope_of(self.tester) != "public"


def agreed(findings: Sequence[Finding]) -> set[str]:
    """The public IPs that testers of two networks name."""
    named: dict[str, set[str]] = {}
    for each in findings:
        if each.outside and each.tester:
            named.setdefault(each.ip, set()).add(addresses.subnet_of(each.tester))
    return {ip for ip, subnets in named.items() if len(subnets) > 1}


def believed(findings: Sequence[Finding]) -> set[str]:
    """The public IPs that we may call our own: one tester's word counts while none differs."""
    found = agreed(findings)
    if found:
        return found
    named = {each.ip for each in findings if not each.neighbour}
    return {each.ip for each in findings if each.outside and each.worked and len(named) == 1}


def disputed(findings: Sequence[Finding]) -> bool:
    """Whether testers from outside tell different things."""
    return len({(each.ip, bool(each.worked)) for each in findings if each.outside}) > 1


def judge(findings: Sequence[Finding]) -> Verdict:
    """Whether strangers can reach us.

    Once somebody sees us from outside, only such findings count: a neighbour behind the same NAT
    reaches us and proves nothing. A failure counts alone only where an address translator shows.
    """
    outside = [each for each in findings if each.outside]
    counted = outside or list(findings)
    worked = sum(bool(each.worked) for each in counted)
    failed = len(counted) - worked
    if worked and worked >= failed:
        return "public"
    translated = any(each.translated for each in counted)
    return "private" if failed >= 2 or (failed and not worked and translated) else "unknown"


class Announcer:
    """What libp2p and we tell others about our addresses; handed to the host when it is built."""

    def __init__(self, configured: Sequence[str] = ()) -> None:
        self.configured = tuple(configured)
        self.findings: tuple[Finding, ...] = ()
        self.verdict: Verdict = "unknown"
        self.circuits: Callable[[], tuple[str, ...]] = tuple
        self.ports: tuple[int, ...] = ()
        # Addresses that worked, by who said so: another's word does not take them back.
        self._kept: dict[str, frozenset[PeerId]] = {}

    def learn(self, findings: Sequence[Finding]) -> None:
        """Take what the newest tests found."""
        again = {each.peer for each in findings if each not in self.findings}
        kept = {address: peers - again for address, peers in self._kept.items()}
        self.findings, self.verdict = tuple(findings), judge(findings)
        for address, peers in self._worked(believed(findings)).items():
            kept[address] = kept.get(address, frozenset()) | peers
        if agreed(findings) or self.verdict == "private":
            kept = self._worked(agreed(findings))
        self._kept = {address: peers for address, peers in kept.items() if peers}

    def __call__(self, listening: list[Multiaddr]) -> list[Multiaddr]:
        """The addresses to tell, from those that the host listens on."""
        texts = [str(address) for address in listening]
        found = [endpoint for endpoint in map(addresses.endpoint_of, texts) if endpoint is not None]
        self.ports = tuple(dict.fromkeys(port for _, port in found))
        wild = any(addresses.scope_of(ip) == "any" for ip, _ in found)
        told = addresses.announced(
            listening=texts,
            configured=self.configured,
            own_ips=own_addresses() if wild else (),
            observed=self._seen_outside(),
            confirmed=self.confirmed(),
            circuits=self.circuits(),
            verdict=self.verdict,
        )
        return [Multiaddr(address) for address in told]

    def observed(self) -> tuple[str, ...]:
        """Where peers see us, with the ports we listen on; most seen first."""
        seen = Counter(each.ip for each in self.findings)
        return tuple(
            addresses.address_of(ip, port) for ip, _ in seen.most_common() for port in self.ports
        )

    def confirmed(self) -> tuple[str, ...]:
        """Where a peer that sees us from outside has reached us."""
        if self.verdict != "public":
            return ()
        return tuple(self._worked(believed(self.findings)) | self._kept)

    def _worked(self, ips: set[str]) -> dict[str, frozenset[PeerId]]:
        """The addresses on these IPs that worked, and for whom."""
        found: dict[str, frozenset[PeerId]] = {}
        for each in self.findings:
            for port in each.worked if each.outside and each.ip in ips else ():
                address = addresses.address_of(each.ip, port)
                found[address] = found.get(address, frozenset()) | {each.peer}
        return found

    def _seen_outside(self) -> tuple[str, ...]:
        """What shows that our own network's addresses lead nowhere.

        Where one of those did work, it takes two testers of different networks.
        """
        if not agreed(self.findings) and any(e.worked and not e.outside for e in self.findings):
            return ()
        return tuple(addresses.address_of(each.ip, 1) for each in self.findings if each.outside)

    def confirmed_by(self) -> tuple[PeerId, ...]:
        """The peers that have reached us."""
        return tuple(each.peer for each in self.findings if each.worked)


class Reach:
    """Asks peers to dial us back, does the same for them, and keeps the verdict.

    `remote_ip` gives the IP of the direct connection to a peer (None: there is none), `testers`
    the peers that may be asked, and `changed` is called when what we announce has changed.
    """

    def __init__(
        self,
        host: Any,
        announcer: Announcer,
        nursery: trio.Nursery,
        *,
        admitted: Callable[[str], bool],
        remote_ip: Callable[[Any], str | None],
        testers: Callable[[], list[ID]],
        new_stream: Callable[[str, str], Any],
        changed: Callable[[], None],
    ) -> None:
        self._host, self.announcer, self._nursery = host, announcer, nursery
        self._admitted, self._remote_ip, self._testers = admitted, remote_ip, testers
        self._new_stream, self._changed = new_stream, changed
        self._upgrader: NotingUpgrader = host.get_network().upgrader
        self._asked = TokenBuckets(
            per_s=limits.REACH_ASKS_PER_S_PER_PEER,
            burst=limits.REACH_ASKS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )
        self._dials = trio.CapacityLimiter(_DIALS_AT_ONCE)
        # The IPs of this machine that our connections left from.
        self._left_from: set[str] = set()
        self._wake = trio.Event()

    def start(self) -> None:
        """Answer others and begin to ask."""
        self._host.set_stream_handler(PROTOCOL, self._serve)
        self._nursery.start_soon(self._keep)

    def met(self, peer: Any) -> None:
        """A member is connected: it may tell us more, and shows whether our network has changed."""
        remote = self._remote_ip(peer)
        here = local_ip(remote) if remote is not None else None
        moved = here is not None and here not in self._left_from
        if moved and here is not None:
            if len(self._left_from) >= _PLACES_MAX:
                self._left_from.clear()
            self._left_from.add(here)
        if moved or len(self.announcer.findings) < _TESTERS:
            self._wake.set()

    # --- asking ---

    async def _keep(self) -> None:
        again = _AGAIN_S_MIN
        while True:
            await self._wake.wait()
            await trio.sleep(_SETTLE_S)
            self._wake = trio.Event()
            before = self.announcer.verdict
            await self.test()
            settled = self.announcer.verdict == before and before != "unknown"
            again = min(again * 2, _AGAIN_S_MAX) if settled else _AGAIN_S_MIN
            with trio.move_on_after(again * random.uniform(0.8, 1.2)):  # noqa: S311 - not a secret
                await self._wake.wait()
            self._wake.set()

    async def test(self) -> None:
        """Ask up to two peers once, two more where they differ, and draw the verdict."""
        found: list[Finding] = []
        testers = self._testers()
        for _ in range(_ROUNDS):
            chosen = choose(testers, self._remote_ip)
            async with trio.open_nursery() as nursery:
                for peer in chosen:
                    nursery.start_soon(self._ask, peer, found)
            if not disputed(found):
                break
            testers = [peer for peer in testers if peer not in chosen]
        if not found:
            return
        asked = {each.peer for each in found}
        # A peer that does not answer now keeps what it said: one that left proves nothing.
        kept = [each for each in self.announcer.findings if each.peer not in asked]
        findings = (*found, *kept)[: max(_TESTERS, len(found))]
        before = (self.announcer.verdict, self.announcer.confirmed(), self.announcer.observed())
        self.announcer.learn(findings)
        if before != (
            self.announcer.verdict,
            self.announcer.confirmed(),
            self.announcer.observed(),
        ):
            logger.info("reach verdict=%s by=%d", self.announcer.verdict, len(findings))
            self._changed()

    async def _ask(self, peer: ID, found: list[Finding]) -> None:
        self._host.get_addrs()  # tells the announcer the ports
        ports = self.announcer.ports[: limits.REACH_PORTS_MAX]
        if not ports or peer in self._upgrader.awaited:
            return
        ask = Ask(secrets.token_hex(8), ports)
        arrived = self._upgrader.awaited[peer] = trio.Event()
        try:
            with trio.fail_after(_EXCHANGE_S):
                stream = await self._new_stream(str(peer), PROTOCOL)
                async with stream:
                    framed = FramedStream(stream)
                    await framed.send(Kind.HEADER, msgspec.json.encode(ask))
                    answer = await framed.expect_header(Answer)
            finding = self._check(peer, ask, answer)
            if finding.worked:
                with trio.move_on_after(_ARRIVAL_S):
                    await arrived.wait()
                if not arrived.is_set():
                    strangers.note(str(peer), "reach", "claims a dial-back that never came")
                    return
            found.append(finding)
        except (LumarisError, ValueError, OSError, trio.TooSlowError) as error:
            logger.debug("reach peer=%s error=%r", peer, error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("reach peer=%s error=%r", peer, error)
        finally:
            del self._upgrader.awaited[peer]

    def _check(self, peer: ID, ask: Ask, answer: Answer) -> Finding:
        if answer.nonce != ask.nonce or not set(answer.worked) <= set(ask.ports):
            raise ValueError("an answer to another question")
        if addresses.scope_of(answer.observed) == "any":
            raise ValueError("nobody is seen at a wildcard")
        ip = addresses.endpoint_of(addresses.address_of(answer.observed, 1))
        assert ip is not None, "an address made of an IP has one"
        remote = self._remote_ip(peer)
        if remote is None:
            raise ValueError("the connection was lost")
        translated = not addresses.same_ip(ip[0], local_ip(remote) or ip[0])
        return Finding(PeerId(str(peer)), ip[0], answer.worked, translated, remote)

    # --- answering ---

    async def _serve(self, net_stream: Any) -> None:
        stream = Libp2pStream(net_stream, PROTOCOL, self._nursery)
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_EXCHANGE_S):
                ask = await framed.expect_header(Ask)
                ip = self._seen_at(net_stream, stream.peer)
                worked = await self._dial_back(stream.peer, ip, tuple(dict.fromkeys(ask.ports)))
                answer = Answer(ask.nonce, ip, worked)
                await framed.send(Kind.HEADER, msgspec.json.encode(answer))
            await stream.aclose()
        except LumarisError as error:
            strangers.note(stream.peer, "reach", error)
            await framed.refuse(error)
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await stream.reset()

    def _seen_at(self, net_stream: Any, peer: PeerId) -> str:
        """The IP of the connection that a request came on. Raises RefusedError."""
        muxed = net_stream.muxed_conn
        remote = muxed.get_remote_address()
        if muxed.get_connection_type() != ConnectionType.DIRECT or remote is None:
            raise RefusedError("dial_back_refused", "The request did not come directly.")
        if not self._admitted(peer):
            raise RefusedError("not_certified")
        if not self._asked.take(peer, trio.current_time()):
            raise RefusedError("dial_back_refused", "The peer asks too often.")
        found = addresses.endpoint_of(addresses.address_of(remote[0], 1))
        assert found is not None, "an address made of an IP has one"
        return found[0]

    async def _dial_back(self, peer: PeerId, ip: str, ports: tuple[int, ...]) -> tuple[int, ...]:
        worked: list[int] = []

        async def one(port: int) -> None:
            async with self._dials:
                if await self._shakes_hands(ip, port, ID.from_base58(peer)):
                    worked.append(port)

        async with trio.open_nursery() as nursery:
            for port in ports:
                nursery.start_soon(one, port)
        return tuple(sorted(worked))

    async def _shakes_hands(self, ip: str, port: int, peer: ID) -> bool:
        """Whether that peer answers there. Never by `host.connect`: it takes what is connected."""
        with trio.move_on_after(_DIAL_S):
            try:
                stream = await trio.open_tcp_stream(ip, port)
            except OSError:
                return False
            try:
                raw = RawConnection(TrioTCPStream(stream), True)
                await self._upgrader.upgrade_security(raw, True, peer)
            except Exception as error:
                logger.debug("dial-back peer=%s error=%r", peer, error)
                return False
            finally:
                await trio.aclose_forcefully(stream)
            return True
        return False


def choose(peers: Sequence[ID], remote_ip: Callable[[Any], str | None]) -> list[ID]:
    """Up to two peers to ask: from outside and from different networks where there are such."""
    shuffled = list(peers)
    random.shuffle(shuffled)
    # A neighbour behind the same address translator cannot tell how the world sees us.
    shuffled.sort(key=lambda peer: addresses.scope_of(remote_ip(peer) or "::") != "public")
    by_subnet: dict[str, ID] = {}
    rest: list[ID] = []
    for peer in shuffled:
        ip = remote_ip(peer)
        if ip is None:
            continue
        if by_subnet.setdefault(addresses.subnet_of(ip), peer) is not peer:
            rest.append(peer)
    return [*by_subnet.values(), *rest][:_TESTERS]
