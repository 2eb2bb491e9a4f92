"""Who is a member: certificates travel in the handshake, and a peer without one is a stranger.

The Noise handshake carries each side's membership certificate in its early data, so both know
before the first stream whether the other is a member. A stranger's connection stays for some
seconds, for `/lumaris/hello/1` alone, where it may show a certificate and be admitted. A member
whose certificate runs out is a stranger again unless a newer one was seen: in a hello, in its
advert, or in a new handshake.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import NoiseFailure
from libp2p.security.noise.messages import NoiseExtensions, NoiseHandshakePayload
from libp2p.security.noise.patterns import PatternXX
from libp2p.security.noise.transport import Transport as NoiseTransport

from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.validate import MembershipGate
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import (
    CLOCK_SKEW_S,
    OVERLAY_CONNECTIONS_MAX,
    STRANGER_S,
    STRANGERS_MAX,
)

logger = logging.getLogger(__name__)

_CHECK_S = 1.0
# Entries live as long as their connection; handshakes that never became one leave some behind.
_MEMBERS_MAX = 4 * OVERLAY_CONNECTIONS_MAX

Clock = Callable[[], float]


@dataclass(frozen=True)
class Member:
    """What a peer's certificate says. `until` counts the tolerance of clocks."""

    account: str
    roles: tuple[str, ...]
    issued_at: int
    until: float
    serial: int


class Admission:
    """The certificates of our peers, and our own. `clock` is the time of day."""

    def __init__(self, gate: MembershipGate, me: PeerId, *, clock: Clock = time.time) -> None:
        self._gate, self._me, self._clock = gate, me, clock
        self._members: OrderedDict[str, Member] = OrderedDict()
        self.certificate = b""

    def __len__(self) -> int:
        return len(self._members)

    def present(self, certificate: bytes) -> bool:
        """Show this certificate from now on; whether it is another than before.

        Raises EnvelopeError when it is not a coordinator's word on our own key.
        """
        self._gate.check(certificate, self._me, self._clock())
        changed = certificate != self.certificate
        self.certificate = certificate
        return changed

    def admit(self, peer: str, certificate: bytes) -> Member:
        """Let a peer in by its certificate. Raises EnvelopeError."""
        found = self._gate.check(certificate, peer, self._clock()).message
        held = self._members.pop(peer, None)
        if held is None or found.issued_at >= held.issued_at:
            until = found.expires_at + CLOCK_SKEW_S
            held = Member(found.account, tuple(found.roles), found.issued_at, until, found.serial)
        while len(self._members) >= _MEMBERS_MAX:
            del self._members[next(iter(self._members))]
        self._members[peer] = held
        return held

    def member(self, peer: str) -> Member | None:
        """What is known of a member; None for a stranger."""
        held = self._members.get(peer)
        if held is None or self._clock() > held.until:
            return None
        revoked = self._gate.revoked.covers(peer, serial=held.serial, issued_at=held.issued_at)
        return None if revoked else held

    def refused(self, peer: str) -> bool:
        """Whether a peer was revoked and has shown no certificate from after that."""
        return self._gate.revoked.names(peer) and not self.admitted(peer)

    def admitted(self, peer: str) -> bool:
        """Whether a peer is a member now."""
        return self.member(peer) is not None

    def part(self, peer: str) -> None:
        """The peer has left: its entry is the first to make room.

        It is not dropped at once, for the certificate goes with the key: a connection that the peer
        began before the old one ended must find it a member.
        """
        if peer in self._members:
            self._members.move_to_end(peer, last=False)


class _MemberPattern(PatternXX):
    """The XX handshake with certificates in its early data; stock, nothing is sent nor kept."""

    _last = b""

    def create_noise_state(self, prologue: bytes | None = None) -> Any:
        """A handshake state that remembers the last payload it decrypted."""
        state = super().create_noise_state(prologue)
        decrypt = state.read_message

        def keep(data: bytes) -> bytes:
            self._last = bytes(decrypt(data))
            return self._last

        state.read_message = keep
        return state

    def make_handshake_payload(
        self, extensions: NoiseExtensions | None = None
    ) -> NoiseHandshakePayload:
        """Our payload, with the certificate."""
        if extensions is None and self.early_data:
            extensions = NoiseExtensions(early_data=self.early_data)
        return super().make_handshake_payload(extensions)

    def shown(self) -> bytes:
        """The other side's certificate, or b"". Only after the handshake."""
        return NoiseHandshakePayload.deserialize(self._last).get_early_data() or b""


class AdmittingNoise(NoiseTransport):
    """Noise that shows our certificate, reads the peer's, and refuses the banned and revoked."""

    def __init__(
        self,
        pair: Any,
        *,
        noise_privkey: Any,
        admission: Admission,
        banned: Callable[[str], bool] = lambda peer: False,
    ) -> None:
        super().__init__(pair, noise_privkey)
        self._admission, self._banned = admission, banned

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """The handshake of an accepted connection. Raises NoiseFailure for a refused peer."""
        pattern = self._pattern()
        return await self._judge(await pattern.handshake_inbound(conn), pattern)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """The handshake of a dialled connection. Raises NoiseFailure for a refused peer."""
        pattern = self._pattern()
        return await self._judge(await pattern.handshake_outbound(conn, peer_id), pattern)

    def _pattern(self) -> _MemberPattern:
        certificate = self._admission.certificate or None
        return _MemberPattern(self.local_peer, self.libp2p_privkey, self.noise_privkey, certificate)

    async def _judge(self, session: ISecureConn, pattern: _MemberPattern) -> ISecureConn:
        peer = str(session.get_remote_peer())
        if self._banned(peer):
            await session.close()
            raise NoiseFailure(f"{peer} was sent away a moment ago")
        shown = pattern.shown()
        revoked = False
        if shown:
            try:
                self._admission.admit(peer, shown)
            except EnvelopeError as error:
                strangers.note(peer, error.code, error.message)
                revoked = error.code == "revoked"
        if revoked or self._admission.refused(peer):
            await session.close()
            raise NoiseFailure(f"{peer} was revoked")
        return session


class StrangerWatch:
    """Keeps few strangers, and each only for some seconds.

    `expired` is called for a connected member whose certificate has run out.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        live: Callable[[], list[Any]],
        drop: Callable[[Any], Awaitable[None]],
        expired: Callable[[Any], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        self._admission, self._live, self._nursery = admission, live, nursery
        self._drop, self._expired = drop, expired
        self._since: dict[Any, float] = {}
        self._leaving: set[Any] = set()  # sent away, and still connected for a moment

    def __len__(self) -> int:
        return len(self._since)

    def meet(self, peer: Any) -> None:
        """A connection to a stranger is up: sent away at once when there are too many."""
        self._leaving.discard(peer)
        self._look()
        self._since.setdefault(peer, trio.current_time())
        self._keep_few()

    async def run(self) -> None:
        """Send strangers away when their time is up."""
        while True:
            await trio.sleep(_CHECK_S)
            self._leaving.clear()  # whose closing failed is sent away again
            self._look()
            self._keep_few()
            deadline = trio.current_time() - STRANGER_S
            for peer, since in list(self._since.items()):
                if since <= deadline:
                    self._send_away(peer, "no certificate in time")

    def _look(self) -> None:
        now, earlier = trio.current_time(), self._since
        live = self._live()
        self._leaving.intersection_update(live)
        found = [
            peer
            for peer in live
            if peer not in self._leaving and not self._admission.admitted(str(peer))
        ]
        self._since = {peer: earlier.get(peer, now) for peer in found}
        for peer in found:
            if peer not in earlier:
                self._nursery.start_soon(self._expired, peer)

    def _keep_few(self) -> None:
        while len(self._since) > STRANGERS_MAX:
            self._send_away(next(reversed(self._since)), "too many strangers")

    def _send_away(self, peer: Any, why: str) -> None:
        strangers.note(str(peer), "sent_away", why)
        self._since.pop(peer, None)
        self._leaving.add(peer)
        self._nursery.start_soon(self._drop, peer)
