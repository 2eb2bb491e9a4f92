"""Frames of a link: what is taken, what is refused, and that nothing else can happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_overlay.links import wire
from lumaris_overlay.links.mux import Mux
from lumaris_overlay.links.wire import Attach, Attached, Decoder, Frame, Kind, Resumed, Target
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import LINK_FRAME_BYTES_MAX

ID = "0f" * 16


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=300)), max_size=8),
    st.integers(1, 50),
)
def test_frames_survive_any_cutting_into_pieces(frames, step):
    data = b"".join(wire.encode(Kind.DATA, lane, body) for lane, body in frames)
    decoder, found = Decoder(), []
    for start in range(0, len(data), step):
        found += decoder.feed(data[start : start + step])
    assert [(frame.lane, frame.body) for frame in found] == frames


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (wire.encode(Kind.PING, 0, b"short"), "malformed"),
        (wire.encode(Kind.DATA, 1, b""), "malformed"),
        (wire.encode(Kind.EOF, 1, b"x"), "oversize"),
        (bytes(9), "malformed"),
        (b"\xff" * 9, "malformed"),
        (b"\x02" + bytes(4) + (LINK_FRAME_BYTES_MAX + 1).to_bytes(4, "big"), "oversize"),
        (b"\x01" + bytes(4) + b"\xff" * 4, "oversize"),
        (b"\x23" + bytes(4) + b"\x00\x01\x00\x00", "oversize"),
    ],
)
def test_what_is_no_frame_is_refused_before_its_body_and_for_good(data, code):
    decoder = Decoder()
    with pytest.raises(EnvelopeError) as caught:
        decoder.feed(data)
    assert caught.value.code == code
    with pytest.raises(EnvelopeError):
        decoder.feed(wire.encode(Kind.EOF, 1))


@given(st.binary(max_size=2000), st.booleans())
def test_random_bytes_break_a_link_and_nothing_else(data, initiator):
    mux = Mux(initiator=initiator, on_lane=lambda _: True)
    try:
        for frame in Decoder().feed(data):
            mux.receive(frame)
    except EnvelopeError:
        pass


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from(Kind), st.integers(0, 3), st.binary(max_size=12)), max_size=30
    ),
    st.booleans(),
)
def test_frames_in_any_order_break_a_link_and_nothing_else(frames, initiator):
    mux = Mux(initiator=initiator, on_lane=lambda _: True)
    if initiator:
        mux.open("/x/1")
    try:
        for kind, lane, body in frames:
            for frame in Decoder().feed(wire.encode(kind, lane, body)):
                mux.receive(frame)
            mux.take()
    except EnvelopeError:
        pass


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 1000,
        b'{"link":"zz","proof":"zz"}',
        b'{"link":"%s","proof":"%s","version":2}' % (ID.encode(), ID.encode()),
        b'{"link":"%s","proof":"%s","more":1}' % (ID.encode(), ID.encode()),
        b'{"link":"%s","proof":1}' % ID.encode(),
    ],
)
def test_a_bad_beginning_is_refused(body):
    with pytest.raises(EnvelopeError) as caught:
        wire.decode_json(Frame(Kind.ATTACH, 0, body), Kind.ATTACH, Attach)
    assert caught.value.code == "malformed"


def test_beginnings_come_back_as_they_were_said():
    target = Target(addresses=(wire.Address("::1", 65535),) * 8, pin="a" * 64, token=ID)
    for kind, said in (
        (Kind.ATTACH, Attach(link=ID, proof=ID, fresh=True)),
        (Kind.ATTACHED, Attached(received=2**63 - 1, target=target)),
        (Kind.RESUMED, Resumed(received=0)),
    ):
        [frame] = Decoder().feed(wire.encode_json(kind, said))
        assert wire.decode_json(frame, kind, type(said)) == said
    with pytest.raises(EnvelopeError):
        wire.decode_json(Frame(Kind.RESUMED, 0, b'{"received":-1}'), Kind.RESUMED, Resumed)


def test_the_most_protocols_fit_their_frame():
    names = tuple(f"/{'x' * 60}/{number}" for number in range(100))
    [frame] = Decoder().feed(wire.encode_serves(names))
    assert wire.decode_serves(frame) == set(names[:32])
