"""A link without its connections: lanes, credits, and what must be sent again.

Both sides count the frames that matter (`wire.LAST_COUNTED`). A counted frame is kept until the
other side says that it has arrived, so that after a lost connection the rest is sent again on the
next one: nothing is lost and nothing is doubled, wherever the cut was. A lane's bytes are bounded
by credits that its reader gives, so a slow reader holds up its own lane only; what is kept for
sending again is bounded for the whole link.

Only the side that began the link opens lanes, so lane numbers grow, and a frame for a number that
is no longer known belongs to a lane that ended here and is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lumaris_overlay.links import wire
from lumaris_overlay.links.wire import LAST_COUNTED, Frame, Kind
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import (
    LINK_FRAME_BYTES_MAX,
    LINK_LANES_MAX,
    LINK_UNACKED_BYTES_MAX,
    LINK_WINDOW_BYTES,
    LINK_WINDOW_BYTES_MAX,
)

# What one write takes at most: large enough to amortise its cost, small enough that a ping is
# not stuck behind it on a slow line.
_BATCH_BYTES = 256 * 1024
# Bytes of one lane that wait for the writer: more would only make other lanes wait longer.
_UNSENT_BYTES = 128 * 1024
# Each kept frame costs this much besides its bytes, so that tiny frames are bounded too.
_FRAME_COST = 128
# Unread pieces up to this size are joined: each object costs some 60 bytes besides its own.
_JOINED_BYTES = 4096
# Arrivals are told at the latest after this much; otherwise with whatever is sent anyway.
_ACK_BYTES = LINK_UNACKED_BYTES_MAX // 16
# Control frames of ours may go over the bound for data; beyond twice of it the peer takes our
# frames and never says so.
_KEPT_BYTES_MAX = 2 * LINK_UNACKED_BYTES_MAX


def _nothing() -> None:
    return


class LaneState:
    """One lane as this side sees it."""

    def __init__(self, number: int, protocol: str) -> None:
        self.number, self.protocol = number, protocol
        # Inward: what was received and not read, and how much more the peer may send.
        self.buffer: deque[bytes | bytearray] = deque()
        self.unread = 0
        self.window = LINK_WINDOW_BYTES
        self.allowed = LINK_WINDOW_BYTES
        self.consumed = 0
        self.ended = False
        # Outward: how much we may send, and what of it waits for the writer.
        self.credit = LINK_WINDOW_BYTES
        self.unsent = 0
        self.finished = False
        self.deaf = False  # the peer reads nothing more
        self.broken = False
        self.on_readable: Callable[[], None] = _nothing
        self.on_writable: Callable[[], None] = _nothing

    def keep(self, data: bytes) -> None:
        """Hold received bytes until they are read."""
        buffer = self.buffer
        if not buffer or len(buffer[-1]) + len(data) > _JOINED_BYTES:
            buffer.append(data)
            return
        last = buffer[-1]
        if not isinstance(last, bytearray):
            last = buffer[-1] = bytearray(last)
        last += data

    def lose(self) -> None:
        """Both directions are gone; what was received can still be read."""
        self.broken = True
        self.on_readable()
        self.on_writable()


class Mux:
    """All that a link is, apart from its connections.

    `receive` takes the peer's frames, `take` gives bytes to send. `on_output` is called when there
    may be something to send where there was nothing.
    """

    def __init__(
        self,
        *,
        initiator: bool,
        on_output: Callable[[], None] = _nothing,
        on_lane: Callable[[LaneState], bool] | None = None,
    ) -> None:
        self.initiator = initiator
        self.lanes: dict[int, LaneState] = {}
        self.serves: frozenset[str] | None = None  # None until the peer has said
        self.closed = False  # the peer closed the link, or it failed
        self.unread = 0
        self._on_output, self._on_lane = on_output, on_lane
        self._last_lane = 0
        self._unsent: deque[tuple[bytes, LaneState | None]] = deque()
        self._unacked: deque[bytes] = deque()
        self._kept = 0  # cost of all frames in both queues
        self._acked = 0  # counted frames of ours that the peer has
        self._received = 0  # counted frames of the peer that we have
        self._told = 0  # of which the peer knows
        self._untold_bytes = 0
        self._ping: bytes | None = None
        self._pong: bytes | None = None
        self._room_wanted: deque[LaneState] = deque()
        self._corked = False

    # --- our side ---

    @property
    def received(self) -> int:
        """Counted frames that have arrived from the peer."""
        return self._received

    def open(self, protocol: str) -> LaneState | None:
        """A new lane, or None when there are too many."""
        assert self.initiator, "only the side that began the link opens lanes"
        if len(self.lanes) >= LINK_LANES_MAX:
            return None
        self._last_lane += 1
        lane = self.lanes[self._last_lane] = LaneState(self._last_lane, protocol)
        self._put(wire.encode(Kind.OPEN, lane.number, protocol.encode()))
        return lane

    @contextmanager
    def corked(self) -> Generator[None]:
        """Let several frames gather; whoever asked for it then sees to their sending."""
        self._corked = True
        try:
            yield
        finally:
            self._corked = False

    def say_serves(self, protocols: tuple[str, ...]) -> None:
        """Tell which protocols are answered."""
        self._put(wire.encode_serves(protocols))

    def say_close(self) -> None:
        """The link ends once this has been sent."""
        self._put(wire.encode(Kind.CLOSE))

    def room(self, lane: LaneState) -> int:
        """How many bytes the lane takes now; 0 also means that `on_writable` will be called."""
        room = min(lane.credit, _UNSENT_BYTES - lane.unsent, LINK_UNACKED_BYTES_MAX - self._kept)
        if room <= 0 and lane not in self._room_wanted:
            self._room_wanted.append(lane)
        return max(room, 0)

    def write(self, lane: LaneState, data: memoryview) -> int:
        """Queue as much as there is room for; how much that was."""
        taken = min(len(data), self.room(lane))
        for start in range(0, taken, LINK_FRAME_BYTES_MAX):
            piece = data[start : min(start + LINK_FRAME_BYTES_MAX, taken)]
            lane.unsent += len(piece)
            self._put(wire.encode(Kind.DATA, lane.number, piece), lane)
        lane.credit -= taken
        return taken

    def read(self, lane: LaneState, size_max: int) -> bytes:
        """Received bytes, b"" when there are none; gives the peer new credit."""
        if not lane.buffer:
            return b""
        data = lane.buffer.popleft()
        if len(data) > size_max:
            lane.buffer.appendleft(data[size_max:])
            data = data[:size_max]
        elif lane.buffer and len(data) < size_max:
            parts, size = [data], len(data)
            while lane.buffer and size + len(lane.buffer[0]) <= size_max:
                parts.append(lane.buffer.popleft())
                size += len(parts[-1])
            data = b"".join(parts)
        lane.unread -= len(data)
        self.unread -= len(data)
        lane.consumed += len(data)
        if lane.consumed * 2 >= lane.window and not (lane.ended or lane.broken):
            self._give_credit(lane)
        return bytes(data)

    def finish(self, lane: LaneState) -> None:
        """Nothing more is sent on the lane."""
        if not (lane.finished or lane.broken):
            lane.finished = True
            if not lane.deaf:
                self._put(wire.encode(Kind.EOF, lane.number))

    def close(self, lane: LaneState) -> None:
        """This side is through with the lane; what it sent still arrives."""
        if lane.number not in self.lanes:
            return
        self.finish(lane)
        if not (lane.ended or lane.broken):
            self._put(wire.encode(Kind.STOP, lane.number))
        self._drop(lane)

    def reset(self, lane: LaneState) -> None:
        """Give the lane up both ways."""
        if lane.number in self.lanes:
            self._put(wire.encode(Kind.RESET, lane.number))
            self._drop(lane)
        lane.lose()

    def ping(self, mark: bytes) -> None:
        """Ask for a sign of life (8 bytes that come back)."""
        self._ping = mark
        self._on_output()

    def end(self) -> None:
        """The link is over: every lane breaks."""
        self.closed = True
        lanes, self.lanes = list(self.lanes.values()), {}
        self._unsent.clear()
        self._unacked.clear()
        self._room_wanted.clear()
        for lane in lanes:
            lane.lose()

    # --- the connection's side ---

    @property
    def drained(self) -> bool:
        """Whether everything has been given to a connection."""
        return not self._unsent

    def take(self) -> bytes:
        """The next bytes to send, b"" when there are none."""
        out: list[bytes] = []
        size = 0
        if self._pong is not None:
            out.append(wire.encode(Kind.PONG, 0, self._pong))
        if self._ping is not None:
            out.append(wire.encode(Kind.PING, 0, self._ping))
        if self._told != self._received and (
            out or self._unsent or self._untold_bytes >= _ACK_BYTES
        ):
            out.append(wire.encode(Kind.ACK, 0, self._received.to_bytes(8, "big")))
            self._told, self._untold_bytes = self._received, 0
        self._ping = self._pong = None
        while self._unsent and size < _BATCH_BYTES:
            frame, lane = self._unsent.popleft()
            self._unacked.append(frame)
            out.append(frame)
            size += len(frame)
            if lane is not None:
                lane.unsent -= len(frame) - wire.HEADER_BYTES
        if size:
            self._wake_writers()
        return b"".join(out) if len(out) != 1 else out[0]

    def resume(self, peer_received: int) -> None:
        """A new connection begins: what the peer does not have is sent again.

        Raises EnvelopeError when the peer claims what was never sent.
        """
        self._acknowledge(peer_received)
        again = [(frame, None) for frame in self._unacked]
        self._unacked.clear()
        self._unsent.extendleft(reversed(again))
        self._told, self._untold_bytes = self._received, 0
        self._ping = self._pong = None
        self._on_output()

    def receive(self, frame: Frame) -> None:
        """Take one frame of the peer. Raises EnvelopeError when it breaks the rules."""
        kind = frame.kind
        if kind <= LAST_COUNTED:
            self._received += 1
            self._untold_bytes += len(frame.body) + _FRAME_COST
            if self._untold_bytes >= _ACK_BYTES:
                self._on_output()
            self._receive_counted(frame)
        elif kind is Kind.ACK:
            self._acknowledge(int.from_bytes(frame.body, "big"))
        elif kind is Kind.PING:
            self._pong = frame.body
            self._on_output()
        elif kind is not Kind.PONG:
            raise EnvelopeError("malformed", f"A {kind.name} frame in the middle of a link.")

    def _receive_counted(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.OPEN:
            self._accept(frame)
        elif kind is Kind.CLOSE:
            self.closed = True
        elif kind is Kind.SERVES:
            self.serves = wire.decode_serves(frame)
        else:
            lane = self.lanes.get(frame.lane)
            if lane is not None:
                self._receive_on(lane, frame)
            elif not 0 < frame.lane <= self._last_lane:
                raise EnvelopeError("malformed", f"A frame for lane {frame.lane}, never opened.")

    def _receive_on(self, lane: LaneState, frame: Frame) -> None:
        match frame.kind:
            case Kind.DATA:
                size = len(frame.body)
                if size > lane.allowed or lane.ended:
                    raise EnvelopeError("oversize", f"Lane {lane.number} goes over its credit.")
                lane.allowed -= size
                lane.unread += size
                self.unread += size
                lane.keep(frame.body)
                lane.on_readable()
            case Kind.CREDIT:
                lane.credit += int.from_bytes(frame.body, "big")
                if lane.credit > LINK_WINDOW_BYTES_MAX:
                    raise EnvelopeError("oversize", f"Too much credit for lane {lane.number}.")
                lane.on_writable()
            case Kind.EOF:
                lane.ended = True
                lane.on_readable()
            case Kind.STOP:
                lane.deaf = True
                lane.on_writable()
            case _:
                self._drop(lane)
                lane.lose()

    def _accept(self, frame: Frame) -> None:
        if self.initiator or frame.lane <= self._last_lane:
            raise EnvelopeError("malformed", f"Lane {frame.lane} cannot be opened by the peer.")
        try:
            protocol = frame.body.decode("ascii")
        except UnicodeDecodeError:
            raise EnvelopeError("malformed", "A protocol's name is not ASCII.") from None
        self._last_lane = frame.lane
        lane = LaneState(frame.lane, protocol)
        if self._has_room():
            self.lanes[frame.lane] = lane
            if self._on_lane is None or self._on_lane(lane):
                return
            del self.lanes[frame.lane]
        self._put(wire.encode(Kind.RESET, frame.lane))

    # --- inside ---

    def _has_room(self) -> bool:
        # The peer does not count lanes that it has closed; our handlers of those may still run.
        if len(self.lanes) < LINK_LANES_MAX:
            return True
        open_there = sum(not (lane.ended and lane.deaf) for lane in self.lanes.values())
        return open_there < LINK_LANES_MAX and len(self.lanes) < 2 * LINK_LANES_MAX

    def _put(self, frame: bytes, lane: LaneState | None = None) -> None:
        if self.closed:
            return
        self._unsent.append((frame, lane))
        self._kept += len(frame) + _FRAME_COST
        if not self._corked:
            self._on_output()

    def check_kept(self) -> None:
        """Raises EnvelopeError when the peer makes us keep frames without end."""
        if self._kept > _KEPT_BYTES_MAX:
            raise EnvelopeError("oversize", "The peer does not say what has arrived.")

    def _acknowledge(self, count: int) -> None:
        if not 0 <= count - self._acked <= len(self._unacked):
            raise EnvelopeError("out_of_sequence", "The peer claims frames that were never sent.")
        freed = count - self._acked
        for _ in range(freed):
            self._kept -= len(self._unacked.popleft()) + _FRAME_COST
        self._acked = count
        if freed:
            self._wake_writers()

    def _give_credit(self, lane: LaneState) -> None:
        # A reader that keeps up is what limits the line: give it more, up to the bound.
        if not lane.buffer and lane.window < LINK_WINDOW_BYTES_MAX:
            lane.consumed += lane.window
            lane.window *= 2
        lane.allowed += lane.consumed
        self._put(wire.encode(Kind.CREDIT, lane.number, lane.consumed.to_bytes(4, "big")))
        lane.consumed = 0

    def _wake_writers(self) -> None:
        # Each looks again for itself, and asks again when it finds no room.
        waiting, self._room_wanted = self._room_wanted, deque()
        for lane in waiting:
            lane.on_writable()

    def _drop(self, lane: LaneState) -> None:
        self.lanes.pop(lane.number, None)
        self.unread -= lane.unread
        lane.unread = 0
        lane.buffer.clear()
