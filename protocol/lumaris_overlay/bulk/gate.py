"""Where a program's peers may connect for bulk data: with a token, once, and soon.

The direct listener hands over a connection whose first byte was 0x02. Inside TLS the dialler shows
the token that it was given on an authenticated lane; the token names the transfer it is for.
"""

from __future__ import annotations

import hashlib
import secrets
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.threads import DIAL_S, TOKEN_BYTES, in_thread, take_socket
from lumaris_overlay.bulk.wire import Cut, Wire
from lumaris_overlay.networks import network_of
from lumaris_protocol.limits import BULK_TRANSFERS_MAX

TOKEN_S = 15.0  # from the answer on the lane to the token on the new connection
# Connections that have shown no token yet: strangers can open them, and each holds a thread for up
# to 10 s. One network has a few, so that it does not keep all the others out.
_UNPROVEN_MAX = 64
_UNPROVEN_PER_NETWORK_MAX = 8


class Ticket:
    """One transfer that a peer may connect for."""

    def __init__(self, work: Callable[[Wire], None], expires_at: float, rate: Rate | None) -> None:
        self.token = secrets.token_hex(TOKEN_BYTES)
        self.claimed, self.done = trio.Event(), trio.Event()
        self.error: Exception | None = None
        self.work, self.expires_at, self.rate = work, expires_at, rate
        self.wire: Wire | None = None

    def finish(self, error: Exception | None) -> None:
        """The transfer is over."""
        self.error = error
        self.done.set()

    def stop(self) -> None:
        """Break the connection, if there is one."""
        if self.wire is not None:
            self.wire.stop()


class BulkGate:
    """Hands out tokens and takes the connections that show one."""

    def __init__(self, *, rate: Rate | None = None) -> None:
        self.rate = rate
        self._tickets: dict[bytes, Ticket] = {}
        # Of their own: transfers in progress never keep a newcomer from showing its token.
        self._unproven = trio.CapacityLimiter(_UNPROVEN_MAX)
        self._unproven_of: Counter[str] = Counter()

    def issue(self, work: Callable[[Wire], None], *, rate: Rate | None = None) -> Ticket | None:
        """A ticket whose `work` runs in a thread on the connection that shows its token.

        `rate` is in place of the gate's own.
        None when too many are out: the transfer then takes the lane.
        """
        now = trio.current_time()
        for name in [name for name, held in self._tickets.items() if held.expires_at <= now]:
            del self._tickets[name]
        if len(self._tickets) >= BULK_TRANSFERS_MAX:
            return None
        ticket = Ticket(work, now + TOKEN_S, rate or self.rate)
        self._tickets[_name(bytes.fromhex(ticket.token))] = ticket
        return ticket

    def revoke(self, ticket: Ticket) -> None:
        """No connection is taken for it any more, and the one there is breaks."""
        self._tickets.pop(_name(bytes.fromhex(ticket.token)), None)
        ticket.stop()

    async def accept(self, sock: trio.socket.SocketType, context: ssl.SSLContext) -> None:
        """Serve one connection to its end and close it. Never raises for what the peer does."""
        try:
            network = network_of(str(sock.getpeername()[0]))
        except OSError:
            sock.close()
            return
        if (
            not self._unproven.available_tokens
            or self._unproven_of[network] >= _UNPROVEN_PER_NETWORK_MAX
        ):
            sock.close()
            return
        try:
            tls = context.wrap_socket(
                take_socket(sock), server_side=True, do_handshake_on_connect=False
            )
        except OSError:
            sock.close()
            return
        wire = Wire(tls)
        try:
            with self._one_of(network):
                ticket = await self._greet(wire, tls)
            if ticket is not None:
                await self._serve(ticket, wire)
        except Cut:
            pass
        finally:
            wire.close()

    @contextmanager
    def _one_of(self, network: str) -> Iterator[None]:
        self._unproven_of[network] += 1
        try:
            yield
        finally:
            self._unproven_of[network] -= 1
            if not self._unproven_of[network]:
                del self._unproven_of[network]

    async def _greet(self, wire: Wire, tls: ssl.SSLSocket) -> Ticket | None:
        def read_token() -> bytes:
            token, timeout = bytearray(TOKEN_BYTES), tls.gettimeout()
            tls.settimeout(DIAL_S)
            try:
                tls.do_handshake()
            except OSError as error:
                raise Cut(str(error)) from None
            wire.receive(memoryview(token))
            tls.settimeout(timeout)
            return bytes(token)

        with trio.move_on_after(2 * DIAL_S):
            token = await in_thread(read_token, stop=wire.stop, limiter=self._unproven)
            # Found by its hash: how long a look-up takes says nothing about another's token.
            ticket = self._tickets.pop(_name(token), None)
            return ticket if ticket and trio.current_time() < ticket.expires_at else None
        return None

    async def _serve(self, ticket: Ticket, wire: Wire) -> None:
        ticket.wire, wire.rate = wire, ticket.rate
        ticket.claimed.set()
        error: Exception | None = Cut("The transfer was given up.")
        try:
            await in_thread(lambda: ticket.work(wire), stop=wire.stop)
            error = None
        except Exception as failure:  # it is the transfer's, not the listener's
            error = failure
        finally:
            ticket.finish(error)


def _name(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
