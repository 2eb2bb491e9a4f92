"""`/lumaris/hello/1`: who are you, what time is it, what do you speak, where do you see me?

The asker sends one HEADER, a `Greeting`, and ends its side; the answer is a HEADER of the same
form. It is the one protocol that a stranger may speak: a valid certificate in a greeting admits
its sender. It also measures the round trip and the difference of the clocks, and carries renewed
certificates to the peers we are connected to.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import msgspec
import trio
from libp2p.connection_types import ConnectionType
from msgspec import Meta
from multiaddr import Multiaddr

from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.libp2p.admission import Admission
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import Ping
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import frames, limits
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.protocols import HELLO

logger = logging.getLogger(__name__)

_EXCHANGE_S = 5.0
_PROTOCOLS_MAX = 32
# A certificate in base64, the protocols' names and an address.
_FRAME_MAX = limits.ADVERT_BYTES_MAX * 2 + _PROTOCOLS_MAX * (limits.NAME_CHARS_MAX + 3) + 1024

NewStream = Callable[[str, str], Awaitable[Libp2pStream]]


class Greeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One side of a hello. `observed` is where the other side's connection comes from."""

    time_ms: Annotated[int, Meta(ge=0, le=1 << 50)]
    certificate: Annotated[bytes, Meta(max_length=limits.ADVERT_BYTES_MAX)] = b""
    protocols: Annotated[
        tuple[Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)], ...],
        Meta(max_length=_PROTOCOLS_MAX),
    ] = ()
    observed: Annotated[str, Meta(max_length=limits.ADDRESS_CHARS_MAX)] = ""


_GREETING = msgspec.json.Decoder(Greeting)


class Hello:
    """Asks and answers hellos. `on_admitted` is called when a stranger has become a member.

    `fault` is called with a peer's id, a kind and the detail when it breaks the format.
    """

    def __init__(
        self,
        host: Any,
        admission: Admission,
        nursery: trio.Nursery,
        *,
        new_stream: NewStream,
        protocols: Callable[[], Sequence[str]],
        on_admitted: Callable[[Any], None],
        clock: Callable[[], float] = time.time,
        fault: Callable[[str, str, object], None] = strangers.note,
    ) -> None:
        self._host, self._admission, self._nursery = host, admission, nursery
        self._new_stream, self._protocols = new_stream, protocols
        self._on_admitted, self._clock = on_admitted, clock
        self._fault = fault
        self._observed: dict[str, str] = {}
        self._asks = TokenBuckets(
            per_s=limits.HELLOS_PER_S_PER_PEER,
            burst=limits.HELLOS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )

    def observed(self) -> tuple[str, ...]:
        """Where our connections seem to come from, the address most peers name first."""
        return tuple(address for address, _ in Counter(self._observed.values()).most_common())

    def observers(self) -> dict[str, str]:
        """What each peer said of where we are."""
        return dict(self._observed)

    async def ask(self, peer: str) -> Ping:
        """One hello with a connected peer. Raises RemoteError `unreachable`."""
        try:
            with trio.fail_after(_EXCHANGE_S):
                stream = await self._new_stream(peer, HELLO)
                async with stream:
                    began_at, began = self._clock(), trio.current_time()
                    await stream.send_all(self._greeting(peer))
                    greeting = await _read(stream)
                    round_trip_s = trio.current_time() - began
        except trio.TooSlowError:
            raise RemoteError("unreachable", f"The peer {peer} did not say hello.") from None
        except EnvelopeError as error:
            self._broken(peer, error)
            raise RemoteError("unreachable", f"The peer {peer} said no clear hello.") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise RemoteError("unreachable", f"The peer {peer} hung up.") from error
        self._take(peer, greeting)
        offset_s = greeting.time_ms / 1000 - (began_at + round_trip_s / 2)
        return Ping(round_trip_s, offset_s, relayed=self._relayed(peer))

    async def tell(self, peer: Any) -> None:
        """Say hello for what the other side learns by it. Never raises."""
        try:
            await self.ask(str(peer))
        except RemoteError as error:
            logger.debug("hello peer=%s error=%s", peer, error)

    async def serve(self, net_stream: Any) -> None:
        """Answer one hello."""
        stream = Libp2pStream(net_stream, HELLO, self._nursery)
        if not self._asks.take(stream.peer, trio.current_time()):
            await stream.reset()
            return
        try:
            with trio.fail_after(_EXCHANGE_S):
                greeting = await _read(stream)
                self._take(stream.peer, greeting)
                await stream.send_all(self._greeting(stream.peer))
            await stream.aclose()
        except EnvelopeError as error:
            self._broken(stream.peer, error)
            await stream.reset()
        except trio.TooSlowError as error:
            strangers.note(stream.peer, "hello", error)
            await stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.reset()

    def forget(self, peer: str) -> None:
        """The peer has left: what it said of us no longer counts."""
        self._observed.pop(peer, None)

    def _broken(self, peer: str, error: EnvelopeError) -> None:
        """One whose process ended midway did nothing wrong."""
        report = strangers.note if error.code == "truncated" else self._fault
        report(peer, "hello", error)

    def _greeting(self, peer: str) -> bytes:
        greeting = Greeting(
            time_ms=int(self._clock() * 1000),
            certificate=self._admission.certificate,
            protocols=tuple(self._protocols())[:_PROTOCOLS_MAX],
            observed=self._address_of(peer),
        )
        return frames.encode(Kind.HEADER, msgspec.json.encode(greeting))

    def _take(self, peer: str, greeting: Greeting) -> None:
        if greeting.certificate:
            was_member = self._admission.admitted(peer)
            try:
                self._admission.admit(peer, greeting.certificate)
            except EnvelopeError as error:
                strangers.note(peer, error.code, error.message)
            else:
                if not was_member:
                    self._on_admitted(peer)
        if self._admission.admitted(peer) and _plausible(greeting.observed):
            self._observed.pop(peer, None)
            while len(self._observed) >= limits.OVERLAY_CONNECTIONS_MAX:
                del self._observed[next(iter(self._observed))]
            self._observed[peer] = greeting.observed

    def _address_of(self, peer: str) -> str:
        """Where a peer's direct connection comes from; "" when there is none."""
        for connection in self._connections(peer):
            for address in connection.get_transport_addresses():
                if _plausible(str(address)):
                    return str(address)
        return ""

    def _relayed(self, peer: str) -> bool:
        found = self._connections(peer)
        return bool(found) and all(
            held.get_connection_type() == ConnectionType.RELAYED
            or any("/p2p-circuit" in str(a) for a in held.get_transport_addresses())
            for held in found
        )

    def _connections(self, peer: str) -> list[Any]:
        everyone = self._host.get_network().connections
        return [
            connection
            for known, held in everyone.items()
            if str(known) == peer
            for connection in held
            if not connection.is_closed
        ]


async def _read(stream: Libp2pStream) -> Greeting:
    body = await FrameReader(stream, size_max=_FRAME_MAX).expect(Kind.HEADER)
    try:
        return _GREETING.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EnvelopeError("malformed", "The greeting is not understood.") from None


def _plausible(address: str) -> bool:
    """Whether this names an IP and a TCP port, and nothing behind them."""
    try:
        parts = str(Multiaddr(address)).split("/")
        return (
            len(parts) == 5
            and parts[1] in ("ip4", "ip6")
            and parts[3] == "tcp"
            and 0 < int(parts[4]) <= 65_535
            and not ipaddress.ip_address(parts[2]).is_unspecified
        )
    except Exception:
        return False
