"""Whatever is cut and whenever: what was sent arrives once and in order, within its bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_overlay.links import mux as module
from lumaris_overlay.links import wire
from lumaris_overlay.links.mux import LaneState, Mux
from lumaris_overlay.links.wire import Decoder, Frame, Kind
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import (
    LINK_FRAME_BYTES_MAX,
    LINK_LANES_MAX,
    LINK_UNACKED_BYTES_MAX,
    LINK_WINDOW_BYTES,
    LINK_WINDOW_BYTES_MAX,
)


def open_lanes(mux: Mux, count: int) -> list[LaneState]:
    lanes = [mux.open(f"/lane/{number}") for number in range(count)]
    return [lane for lane in lanes if lane is not None]


class Pair:
    """Two ends and the bytes in flight between them."""

    def __init__(self, lanes: int = 1) -> None:
        self.near = Mux(initiator=True)
        self.accepted: list[LaneState] = []
        self.far = Mux(initiator=False, on_lane=self._accept)
        self.ends = (self.near, self.far)
        self.flight = (bytearray(), bytearray())  # from near, from far
        self.decoders = (Decoder(), Decoder())
        self.opened = open_lanes(self.near, lanes)
        self.counter = itertools.count()

    def _accept(self, lane: LaneState) -> bool:
        self.accepted.append(lane)
        return True

    def load(self) -> None:
        for side in (0, 1):
            while data := self.ends[side].take():
                self.flight[side].extend(data)

    def move(self, side: int, size: int) -> None:
        """Let bytes of one direction arrive."""
        self.load()
        flight = self.flight[side]
        data = bytes(flight[:size])
        del flight[:size]
        for frame in self.decoders[side].feed(data):
            self.ends[1 - side].receive(frame)

    def cut(self) -> None:
        """Lose what is in flight; go on over a new connection."""
        self.flight = (bytearray(), bytearray())
        self.decoders = (Decoder(), Decoder())
        self.near.resume(self.far.received)
        self.far.resume(self.near.received)

    def settle(self) -> None:
        while True:
            self.load()
            if not any(self.flight):
                return
            for side in (0, 1):
                self.move(side, len(self.flight[side]))

    def lane(self, side: int, number: int) -> LaneState | None:
        lanes = self.accepted if side else self.opened
        return lanes[number] if number < len(lanes) else None


def pattern(counter: itertools.count[int], size: int) -> bytes:
    return b"".join(next(counter).to_bytes(4, "big") for _ in range(size // 4))


ACTIONS = st.one_of(
    st.tuples(
        st.just("write"), st.integers(0, 1), st.integers(0, 2), st.sampled_from([4, 400, 200_000])
    ),
    st.tuples(
        st.just("read"), st.integers(0, 1), st.integers(0, 2), st.sampled_from([1, 1000, 500_000])
    ),
    st.tuples(
        st.just("move"), st.integers(0, 1), st.just(0), st.sampled_from([1, 8, 30, 500, 300_000])
    ),
    st.tuples(st.just("cut"), st.just(0), st.just(0), st.just(0)),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(ACTIONS, max_size=60))
def test_all_bytes_arrive_once_and_in_order_through_any_cuts(actions):
    pair = Pair(lanes=3)
    sent: dict[tuple[int, int], bytearray] = {}
    got: dict[tuple[int, int], bytearray] = {}

    def read(side: int, number: int, size: int) -> None:
        lane = pair.lane(side, number)
        if lane is not None:
            got.setdefault((side, number), bytearray()).extend(pair.ends[side].read(lane, size))

    for what, side, number, size in actions:
        lane = pair.lane(side, number)
        if what == "write" and lane is not None:
            data = pattern(pair.counter, size)
            taken = pair.ends[side].write(lane, memoryview(data))
            sent.setdefault((1 - side, number), bytearray()).extend(data[:taken])
        elif what == "read":
            read(side, number, size)
        elif what == "move":
            pair.move(side, size)
        elif what == "cut":
            pair.cut()
    for _ in range(30):
        pair.settle()
        for side, number in itertools.product((0, 1), range(3)):
            read(side, number, 1 << 22)
    assert {key: bytes(value) for key, value in got.items() if value} == {
        key: bytes(value) for key, value in sent.items() if value
    }
    assert pair.near.unread == pair.far.unread == 0


def dialogue(cut_at: tuple[int, int] | None) -> tuple[bytes, bytes, int]:
    """A short exchange, cut once after so many bytes of one direction; what each side read."""
    pair = Pair()
    near = pair.opened[0]
    moved = [0, 0]

    def run() -> None:
        while True:
            pair.load()
            if not any(pair.flight):
                return
            for side in (0, 1):
                size = len(pair.flight[side])
                if cut_at and cut_at[0] == side and moved[side] <= cut_at[1] < moved[side] + size:
                    pair.move(side, cut_at[1] - moved[side])
                    moved[side] = 1 << 30
                    pair.cut()
                    break
                pair.move(side, size)
                moved[side] += size

    pair.near.write(near, memoryview(b"hello"))
    pair.far.say_serves(("/a/1",))
    run()
    far = pair.accepted[0]
    there = pair.far.read(far, 100)
    pair.far.write(far, memoryview(b"answer"))
    pair.near.write(near, memoryview(b" world"))
    run()
    pair.near.finish(near)
    run()
    there += pair.far.read(far, 100)
    assert far.ended and pair.near.serves == frozenset({"/a/1"})
    pair.far.close(far)
    run()
    back = pair.near.read(near, 100)
    assert near.ended and len(pair.accepted) == 1
    pair.near.close(near)
    run()
    assert not pair.near.lanes and not pair.far.lanes
    return there, back, max(moved)


def test_a_cut_at_every_byte_changes_nothing():
    _, _, longest = dialogue(None)
    assert longest > 60
    for side, at in itertools.product((0, 1), range(longest)):
        assert dialogue((side, at))[:2] == (b"hello world", b"answer"), (side, at)


def test_a_slow_reader_holds_up_its_own_lane_only():
    pair = Pair(lanes=2)
    slow, quick = pair.opened
    while pair.near.write(slow, memoryview(bytes(LINK_FRAME_BYTES_MAX))):
        pair.settle()
    assert pair.accepted[0].unread == LINK_WINDOW_BYTES
    assert pair.near.write(quick, memoryview(b"still here")) == 10
    pair.settle()
    assert pair.far.read(pair.accepted[1], 100) == b"still here"
    woken = []
    slow.on_writable = lambda: woken.append(True)
    assert pair.near.room(slow) == 0
    pair.far.read(pair.accepted[0], LINK_WINDOW_BYTES)
    pair.settle()
    assert woken and pair.near.room(slow) > 0


def test_the_window_grows_for_a_reader_that_keeps_up_and_only_so_far():
    pair = Pair()
    for _ in range(200):
        pair.near.write(pair.opened[0], memoryview(bytes(100_000)))
        pair.settle()
        pair.far.read(pair.accepted[0], 1 << 22)
        pair.settle()
    assert pair.accepted[0].window == LINK_WINDOW_BYTES_MAX
    assert pair.opened[0].credit <= LINK_WINDOW_BYTES_MAX


def deliver(mux: Mux, *frames: bytes) -> None:
    for frame in Decoder().feed(b"".join(frames)):
        mux.receive(frame)


def test_tiny_frames_cost_no_more_than_their_bytes():
    far = opened_far()
    data = b"".join(number.to_bytes(2, "big") for number in range(20_000))
    for start in range(0, len(data), 2):
        far.receive(Frame(Kind.DATA, 1, data[start : start + 2]))
    lane = far.lanes[1]
    assert lane.unread == far.unread == len(data)
    assert len(lane.buffer) <= 2 * len(data) // module._JOINED_BYTES
    got = far.read(lane, 3) + far.read(lane, 10_000)
    while part := far.read(lane, 1 << 20):
        assert type(part) is bytes
        got += part
    assert got == data and far.unread == 0


def opened_far() -> Mux:
    far = Mux(initiator=False, on_lane=lambda _: True)
    deliver(far, wire.encode(Kind.OPEN, 1, b"/x/1"))
    return far


def test_more_than_the_credit_breaks_the_link():
    far = opened_far()
    chunk = wire.encode(Kind.DATA, 1, bytes(LINK_FRAME_BYTES_MAX))
    for _ in range(LINK_WINDOW_BYTES // LINK_FRAME_BYTES_MAX):
        deliver(far, chunk)
    with pytest.raises(EnvelopeError) as caught:
        deliver(far, wire.encode(Kind.DATA, 1, b"x"))
    assert caught.value.code == "oversize"


@pytest.mark.parametrize(
    "frames",
    [
        [wire.encode(Kind.OPEN, 1, b"/x/1")],  # again
        [wire.encode(Kind.OPEN, 0, b"/x/1")],
        [wire.encode(Kind.OPEN, 2, b"\xff")],
        [wire.encode(Kind.DATA, 2, b"x")],
        [wire.encode(Kind.EOF, 0)],
        [wire.encode(Kind.EOF, 1), wire.encode(Kind.DATA, 1, b"x")],
        [wire.encode(Kind.CREDIT, 1, b"\xff" * 4)],
        [wire.encode(Kind.CREDIT, 1, LINK_WINDOW_BYTES_MAX.to_bytes(4, "big"))],
        [wire.encode(Kind.ACK, 0, b"\x00" * 7 + b"\x01")],
        [wire.encode(Kind.SERVES, 0, b"{}")],
        [wire.encode_json(Kind.RESUMED, wire.Resumed(received=0))],
    ],
)
def test_a_broken_rule_breaks_the_link(frames):
    with pytest.raises(EnvelopeError):
        deliver(opened_far(), *frames)


def test_the_side_that_was_asked_opens_nothing():
    with pytest.raises(EnvelopeError):
        deliver(Mux(initiator=True), wire.encode(Kind.OPEN, 1, b"/x/1"))


@pytest.mark.parametrize("claim", [1, 5, 2**63])
def test_a_peer_that_claims_what_was_never_sent_is_refused(claim):
    with pytest.raises(EnvelopeError) as caught:
        Mux(initiator=True).resume(claim)
    assert caught.value.code == "out_of_sequence"


def test_frames_of_a_lane_that_ended_are_dropped():
    far = opened_far()
    far.reset(far.lanes[1])
    deliver(far, wire.encode(Kind.DATA, 1, b"late"), wire.encode(Kind.EOF, 1))
    assert far.unread == 0 and far.received == 3


def test_lanes_are_bounded_on_both_sides():
    near = Mux(initiator=True)
    assert all(near.open("/x/1") for _ in range(LINK_LANES_MAX))
    assert near.open("/x/1") is None
    far = Mux(initiator=False, on_lane=lambda _: True)
    for number in range(1, LINK_LANES_MAX + 2):
        deliver(far, wire.encode(Kind.OPEN, number, b"/x/1"))
    assert len(far.lanes) == LINK_LANES_MAX
    [frame] = Decoder().feed(far.take())[-1:]
    assert (frame.kind, frame.lane) == (Kind.RESET, LINK_LANES_MAX + 1)


def test_what_is_kept_without_a_connection_is_bounded():
    near = Mux(initiator=True)
    lanes = open_lanes(near, LINK_LANES_MAX)
    for lane in lanes:
        near.write(lane, memoryview(bytes(LINK_WINDOW_BYTES)))
        near.take()
    assert sum(LINK_WINDOW_BYTES - lane.credit for lane in lanes) <= LINK_UNACKED_BYTES_MAX
    assert near.room(lanes[-1]) == 0
    near.check_kept()


@pytest.mark.slow
def test_a_peer_that_makes_us_answer_and_never_acknowledges_is_cut_off():
    far = Mux(initiator=False)  # answers nothing, so each lane costs a RESET

    def flood() -> None:
        for number in range(1, 200_000):
            far.receive(Frame(Kind.OPEN, number, b"/x/1"))
            far.take()
            far.check_kept()

    with pytest.raises(EnvelopeError) as caught:
        flood()
    assert caught.value.code == "oversize"


def test_arrivals_are_told_with_answers_and_when_much_has_arrived():
    pair = Pair()
    pair.settle()
    assert pair.far.take() == b""  # nothing to say, so nothing is said
    pair.near.write(pair.opened[0], memoryview(b"x"))
    pair.settle()
    pair.far.write(pair.accepted[0], memoryview(b"y"))
    kinds = [frame.kind for frame in Decoder().feed(pair.far.take())]
    assert kinds == [Kind.ACK, Kind.DATA]
    for _ in range(module._ACK_BYTES // 100_000 + 1):
        pair.near.write(pair.opened[0], memoryview(bytes(100_000)))
        pair.settle()
        pair.far.read(pair.accepted[0], 1 << 22)
    pair.settle()
    assert pair.near._kept < module._ACK_BYTES + 200_000


def test_pings_are_answered_once_for_many():
    far = Mux(initiator=False)
    for number in range(1000):
        far.receive(Frame(Kind.PING, 0, number.to_bytes(8, "big")))
    assert far.take() == wire.encode(Kind.PONG, 0, (999).to_bytes(8, "big"))
    assert far.take() == b""


def test_the_end_breaks_lanes_and_leaves_what_was_received():
    pair = Pair()
    pair.near.write(pair.opened[0], memoryview(b"last words"))
    pair.settle()
    pair.far.end()
    lane = pair.accepted[0]
    assert lane.broken and pair.far.read(lane, 100) == b"last words"
    assert pair.far.take() == b""
