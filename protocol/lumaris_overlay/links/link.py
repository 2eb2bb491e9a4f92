"""A link at work: one connection at a time, and what happens when it is lost.

`run` lives as long as the link. It carries frames over the present connection until that is lost
or a better one is offered, and then begins the next: both sides stop reading the old connection
first, so that the counts of frames they exchange are final. Beginning, moving to TLS and coming
back after a loss are this one operation.

The side that began the link dials: it first speaks inside the overlay, moves to TLS when the other
program can be reached, and after a loss tries both until nothing was heard for `resume_s`. The
other side waits. What counts is what the peer says on a connection that has begun: to begin one
and hang up is no sign of life.
"""

from __future__ import annotations

import hmac
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from lumaris_overlay.links import direct, wire
from lumaris_overlay.links.carrier import LOST, Carrier
from lumaris_overlay.links.lane import Lane
from lumaris_overlay.links.mux import LaneState, Mux
from lumaris_overlay.links.wire import Attach, Attached, Frame, Kind, Resumed, Target
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import (
    LINK_DEAD_S,
    LINK_FRAME_BYTES_MAX,
    LINK_IDLE_S,
    LINK_LANES_MAX,
    LINK_PING_S,
    LINK_RESUME_S,
)

if TYPE_CHECKING:
    from lumaris_overlay.bulk.gate import BulkGate

logger = logging.getLogger(__name__)

BEGIN_S = 5.0  # a few round trips on a slow line
# Even a link that was idle for long gets one attempt.
_RESUME_S_MIN = 0.1
# A connection that comes at the last moment has this long to show that the peer lives.
_PROOF_S = 0.5
# When nobody listens any more where the peer's program was: it is gone, or has moved and still
# answers inside the overlay.
_GONE_S = 0.7
_CLOSE_S = 1.0  # what was sent last, and the other side's hanging up
_RETRY_S, _RETRY_S_MAX = 0.05, 1.0
_DOUBLINGS_MAX = 5
# A listener that could not be reached is tried again after these waits, then no more.
_MIGRATE_AGAIN_S = (5.0, 30.0, 120.0)
_DIALS_MAX = 4
_PING = bytes(8)

OpenInner = Callable[[], Awaitable[OverlayStream]]
MakeTarget = Callable[[], Awaitable[Target | None]]
Offer = tuple[Carrier, Attached | None]


@dataclass(frozen=True)
class Timing:
    """The waits of a link, in seconds."""

    ping_s: float = LINK_PING_S
    dead_s: float = LINK_DEAD_S
    resume_s: float = LINK_RESUME_S
    idle_s: float = LINK_IDLE_S


class GoneError(Exception):
    """The other program does not know the link, or does not exist any more."""


@dataclass(frozen=True)
class Means:
    """What a link needs of its side.

    `open_inner` is set on the side that began the link; `make_target` where there is a listener,
    with a fresh token; `on_lane` where lanes are answered, and says whether this one is;
    `on_received` is told when unread bytes have grown.
    """

    open_inner: OpenInner | None = None
    make_target: MakeTarget | None = None
    on_lane: Callable[[Lane], bool] | None = None
    on_received: Callable[[], None] = lambda: None
    gate: BulkGate | None = None
    timing: Timing = Timing()


class Link:
    """One link, as either side sees it. `number` names it, `secret` opens it inside the overlay."""

    def __init__(self, peer: PeerId, number: str, secret: str, means: Means) -> None:
        self.peer, self.number = peer, number
        self.mux = Mux(
            initiator=means.open_inner is not None,
            on_output=self._wake_writer,
            on_lane=self._take_lane,
        )
        self.ready = trio.Event()  # the peer has said what it answers, or the link is over
        self.over = trio.Event()
        self.closing = False
        self.used_at = trio.current_time()
        self.carrier: Carrier | None = None
        self._secret, self._token, self._means = secret, "", means
        self._lanes: set[Lane] = set()
        self._target: Target | None = None
        self._worked: tuple[str, int] | None = None
        self._output = trio.lowlevel.ParkingLot()
        self._writing = True  # only a parked writer leaves the connection to `_flush`
        self._offered: Offer | None = None
        self._offer_came = trio.Event()
        self._passed_over: list[Carrier] = []
        self._carrying: trio.CancelScope | None = None
        self._running = trio.CancelScope()
        self._active = trio.Event()
        self._heard = self._active_at = self._retry_at = trio.current_time()
        self._tries = 0  # connections that were tried since the peer was heard
        self._seeking: trio.CancelScope | None = None

    # --- for the overlay ---

    @property
    def alive(self) -> bool:
        """Whether lanes can still be opened."""
        return not (self.closing or self.mux.closed or self.over.is_set())

    @property
    def idle(self) -> bool:
        """Whether no lane is open."""
        return not self._lanes

    def open(self, protocol: str) -> Lane | None:
        """A new lane, or None when there are too many."""
        state = self.mux.open(protocol)
        return None if state is None else self._add(state)

    def opens(self, proof: str, *, by_token: bool) -> bool:
        """Whether this proof opens the link; a token does so once."""
        expected = self._token if by_token else self._secret
        if not expected or not hmac.compare_digest(expected, proof):
            return False
        if by_token:
            self._token = ""
        return True

    def offer(self, carrier: Carrier, attached: Attached | None = None) -> None:
        """Go on over this connection; `attached` is what the side that was dialled answered."""
        if self._offered is not None:
            self._passed_over.append(self._offered[0])
        self._offered = (carrier, attached)
        self._offer_came.set()
        if self._carrying is not None:
            self._carrying.cancel()

    def stop(self) -> None:
        """End it at once."""
        self.closing = True
        self._running.cancel()

    async def close(self) -> None:
        """Send what is left, say that the link ends, and end it."""
        if not self.closing:
            self.closing = True
            self.mux.say_close()
        # Between two connections as well: what was said on the old one must still arrive.
        if self.carrier is not None or self._offered is not None:
            with trio.move_on_after(_CLOSE_S):
                await self.over.wait()
        self._running.cancel()

    async def run(self) -> None:
        """Until the link is over. Never raises for what the peer does."""
        try:
            with self._running:
                # A link that closes while it moves still says so on the connection it moves to.
                while self.alive or (self._offered is not None and not self.mux.closed):
                    offered = await self._next()
                    if offered is None:
                        break
                    if await self._begin(*offered):
                        await self._carry()
        except GoneError:
            logger.info("link peer=%s event=gone", self.peer)
        except RemoteError as error:
            self._break(error)
        finally:
            self.over.set()
            self.mux.end()
            self.ready.set()
            await self._drop_passed_over()
            if self._offered is not None:
                await self._offered[0].drop()
            if self.carrier is not None:
                await self.carrier.drop()

    # --- one connection after another ---

    async def _next(self) -> Offer | None:
        """The next connection, or None when there was none in time. Raises GoneError."""
        now, until = trio.current_time(), self._give_up_at
        if self._means.open_inner is None and not self._lanes:
            until = now + self._means.timing.resume_s  # no work of ours waits for it
        elif not self._tries:
            until = max(until, now + _RESUME_S_MIN)
        try:
            with trio.CancelScope(deadline=until) as self._seeking:
                if self._offered is None and self._means.open_inner is not None:
                    await self._reconnect(self._means.open_inner)
                while self._offered is None:
                    self._offer_came = trio.Event()
                    await self._offer_came.wait()
        finally:
            self._seeking = None
        offered, self._offered = self._offered, None
        await self._drop_passed_over()
        return offered

    @property
    def _give_up_at(self) -> float:
        # An idle link asks for no sign of life, so its last one says nothing about the peer.
        return max(self._heard, self._active_at) + self._means.timing.resume_s

    def _limit(self, seconds: float) -> float:
        """The deadline of a wait; with lanes open not much later than the link's own."""
        now = trio.current_time()
        if not self._lanes:
            return now + seconds
        return min(now + seconds, max(self._give_up_at, now + _PROOF_S))

    async def _drop_passed_over(self) -> None:
        while self._passed_over:
            await self._passed_over.pop().drop()

    async def _begin(self, carrier: Carrier, attached: Attached | None) -> bool:
        """Agree with the other side on what has arrived. Raises EnvelopeError."""
        old, self.carrier = self.carrier, carrier
        done = False
        try:
            with trio.CancelScope(deadline=self._limit(BEGIN_S)):
                if attached is not None:
                    self._target = attached.target
                    received = attached.received
                    mine = Resumed(received=self.mux.received)
                    await carrier.send(wire.encode_json(Kind.RESUMED, mine))
                else:
                    await carrier.send(wire.encode_json(Kind.ATTACHED, await self._answer()))
                    frame = await carrier.frame()
                    received = wire.decode_json(frame, Kind.RESUMED, Resumed).received
                self.mux.resume(received)
                done = True
        except LOST as error:
            logger.info("link peer=%s event=not_begun error=%r", self.peer, error)
        finally:
            # Not earlier: the end of the old connection must not overtake the beginning of the new.
            if old is not None:
                await old.drop()
            if not done:
                await carrier.drop()
        return done

    async def _answer(self) -> Attached:
        make_target = self._means.make_target
        target = None if make_target is None else await make_target()
        self._token = "" if target is None else target.token
        return Attached(received=self.mux.received, target=target)

    async def _carry(self) -> None:
        """Carry frames until the connection is lost, a better one is offered, or it is over."""
        carrier = self.carrier
        assert carrier is not None
        self._tell_lanes()
        try:
            async with background() as nursery:
                self._carrying = nursery.cancel_scope
                if self._offered is not None:
                    return
                nursery.start_soon(self._write, carrier, nursery.cancel_scope)
                nursery.start_soon(self._keep, nursery.cancel_scope)
                if self._means.open_inner is not None and not carrier.direct:
                    nursery.start_soon(self._migrate)
                await self._read(carrier)
        finally:
            self._carrying = None
            if self._offered is None:
                await carrier.drop()

    async def _read(self, carrier: Carrier) -> None:
        try:
            while frames := await carrier.frames():
                if any(frame.kind is not Kind.PING for frame in frames):  # it hears us, too
                    self._heard = trio.current_time()
                    self._tries = 0
                self._take_frames(frames)
                if self.mux.closed:
                    return
        except LOST as error:
            logger.info("link peer=%s event=lost error=%r", self.peer, error)
        except RemoteError as error:
            self._break(error)

    def _take_frames(self, frames: list[Frame]) -> None:
        mux = self.mux
        before = mux.received
        for frame in frames:
            mux.receive(frame)
        mux.check_kept()
        if mux.received != before:
            self.used_at = self._heard
        if mux.unread > LINK_FRAME_BYTES_MAX:  # less is no matter, even of all links together
            self._means.on_received()
        if mux.serves is not None:
            self.ready.set()

    def _break(self, error: RemoteError) -> None:
        """The peer broke a rule: that is the end of the link, and of nothing else."""
        self.closing = True
        logger.warning("link peer=%s code=%s error=%s", self.peer, error.code, error.message)

    async def _write(self, carrier: Carrier, scope: trio.CancelScope) -> None:
        try:
            while True:
                data = self.mux.take()
                if data or carrier.has_rest:
                    await carrier.send(data)
                else:
                    self._writing = False
                    await self._output.park()
        except LOST:
            scope.cancel()
        finally:
            self._writing = True

    async def _keep(self, scope: trio.CancelScope) -> None:
        """Break the connection to a silent peer; end a link that nobody uses."""
        timing = self._means.timing
        # The side that began the link ends it; the other only when that one is gone.
        idle_s = timing.idle_s if self._means.open_inner is not None else 2 * timing.idle_s
        since = started = trio.current_time()
        if self._lanes:
            self.mux.ping(_PING)
        while True:
            if not self._lanes:
                self._active = trio.Event()
                with trio.move_on_after(idle_s) as waiting:
                    await self._active.wait()
                if waiting.cancelled_caught:
                    break
                since = trio.current_time()
                if since - self._heard >= timing.ping_s:
                    self.mux.ping(_PING)
            now = trio.current_time()
            silent_s = now - max(self._heard, since)
            left_s = math.inf
            if self._heard < started:  # nothing was heard on this connection yet
                left_s = max(self._give_up_at, started + _PROOF_S) - now
            if silent_s >= timing.dead_s or left_s <= 0:
                logger.info("link peer=%s event=silent", self.peer)
                scope.cancel()
                return
            if silent_s >= timing.ping_s:
                self.mux.ping(_PING)
            steps = silent_s // timing.ping_s + 1
            await trio.sleep(min(min(steps * timing.ping_s, timing.dead_s) - silent_s, left_s))
        self.closing = True
        self.mux.say_close()
        await trio.sleep(_CLOSE_S)
        scope.cancel()

    # --- dialling ---

    async def _reconnect(self, open_inner: OpenInner) -> None:
        """Dial until a connection can be offered. Raises GoneError when the peer's program is."""
        while True:
            await trio.sleep_until(self._retry_at)
            # Not forgotten when a connection begins: the peer may hang up each time.
            pause_s = min(_RETRY_S * 2 ** min(self._tries, _DOUBLINGS_MAX), _RETRY_S_MAX)
            self._retry_at = trio.current_time() + pause_s
            self._tries += 1
            try:
                # Only where it worked: other addresses would use up the time for the overlay.
                if self._worked is not None and await self._dial_direct((self._worked,)):
                    return
            except GoneError:
                self._target = None
                with trio.move_on_after(_GONE_S):
                    if await self._dial_inner(open_inner):
                        return
                raise
            if await self._dial_inner(open_inner):
                return

    async def _dial_inner(self, open_inner: OpenInner) -> bool:
        """Offer a connection inside the overlay. Raises GoneError when the peer refuses it."""
        try:
            carrier = Carrier(await open_inner(), direct=False)
            self.offer(carrier, await self.ask(carrier, self._secret))
        except (*LOST, LumarisError, trio.TooSlowError) as error:
            logger.info("link peer=%s event=not_resumed error=%r", self.peer, error)
            return False
        return True

    async def _migrate(self) -> None:
        """Move to TLS between the programs, if the other one can be reached."""
        for pause_s in (0.0, *_MIGRATE_AGAIN_S):
            await trio.sleep(pause_s)
            try:
                if self._target is None or await self._dial_direct(
                    self._target.target().addresses[:_DIALS_MAX]
                ):
                    return
            except GoneError:  # nobody listens there, and yet the peer talks to us
                continue

    async def _dial_direct(self, addresses: tuple[tuple[str, int], ...]) -> bool:
        """Offer a TLS connection to the peer's listener; False when it cannot be had now.

        Raises GoneError, once, when nobody listens any more where the listener was.
        """
        target = self._target
        if target is None:
            return False
        for address in addresses:
            if not direct.may_dial(address[0]):
                continue
            try:
                carrier = await direct.dial(address, target.pin)
            except ConnectionRefusedError:
                if address == self._worked:
                    self._worked = None
                    raise GoneError from None
                continue
            except (*LOST, trio.TooSlowError) as error:
                logger.info("link peer=%s event=not_direct error=%r", self.peer, error)
                continue
            self._target = None  # its token is used up, whatever comes back
            try:
                self.offer(carrier, await self.ask(carrier, target.token))
            except (*LOST, RemoteError, trio.TooSlowError, GoneError) as error:
                logger.info("link peer=%s event=not_direct error=%r", self.peer, error)
                return False
            self._worked = address
            return True
        return False

    async def ask(self, carrier: Carrier, proof: str, *, fresh: bool = False) -> Attached:
        """Show the proof on a new connection, which is dropped when that fails.

        Raises GoneError, RemoteError, trio.TooSlowError or one of `LOST`.
        """
        try:
            with trio.fail_after(BEGIN_S):
                attach = Attach(link=self.number, proof=proof, fresh=fresh)
                await carrier.send(wire.encode_json(Kind.ATTACH, attach))
                frame = await carrier.frame()
                if frame.kind is Kind.REFUSED:
                    raise GoneError
                return wire.decode_json(frame, Kind.ATTACHED, Attached)
        except BaseException:
            await carrier.drop()
            raise

    # --- lanes ---

    def _take_lane(self, state: LaneState) -> bool:
        if self._means.on_lane is None:
            return False
        # A lane that the peer gave up is here until its handler ends.
        if len(self._lanes) >= 2 * LINK_LANES_MAX:
            return False
        lane = self._add(state)
        if self._means.on_lane(lane):
            return True
        self._forget(lane)
        return False

    def _add(self, state: LaneState) -> Lane:
        lane = Lane(self.mux, state, self.peer, flush=self._flush, on_close=self._forget)
        self.used_at = trio.current_time()
        if not self._lanes:
            self._active_at = self.used_at
            if self._seeking is not None:
                self._seeking.deadline = max(self._seeking.deadline, self._give_up_at)
        self._lanes.add(lane)
        self._tell_lane(lane)
        self._active.set()
        return lane

    def _forget(self, lane: Lane) -> None:
        self._lanes.discard(lane)
        self.used_at = trio.current_time()

    def _tell_lanes(self) -> None:
        for lane in self._lanes:
            self._tell_lane(lane)

    def _tell_lane(self, lane: Lane) -> None:
        works = self.carrier is not None and self.carrier.direct
        lane.direct = self._target.target() if works and self._target is not None else None
        lane.gate = self._means.gate if works else None

    def _wake_writer(self) -> None:
        self._writing = True
        self._output.unpark_all()

    def _flush(self) -> None:
        """Send what there is in this very moment, when the connection is free and takes it."""
        carrier = self.carrier
        if self._writing or carrier is None or not carrier.direct:
            self._wake_writer()
            return
        data = self.mux.take()
        if (data and not carrier.send_now(data)) or not self.mux.drained:
            self._wake_writer()
