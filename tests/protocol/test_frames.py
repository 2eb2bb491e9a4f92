"""Frames, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import frames
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.frames import Decoder, Frame, Kind
from lumaris_protocol.limits import FRAME_BYTES_MAX

_FRAMES = st.lists(st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=60)), max_size=6)


@given(_FRAMES, st.lists(st.integers(min_value=1, max_value=9), max_size=80))
def test_cuts_do_not_matter(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(frames.encode(frame.kind, frame.body) for frame in sent)
    decoder, found = Decoder(), []
    for size in cuts:
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    found += decoder.feed(stream)
    decoder.finish()
    assert found == sent


def test_size_is_refused_from_the_header_alone() -> None:
    with pytest.raises(EnvelopeError, match="oversize"):
        Decoder().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(EnvelopeError, match="oversize"):
        Decoder(size_max=10).feed((11).to_bytes(4, "big"))
    with pytest.raises(EnvelopeError, match="malformed"):
        Decoder().feed(bytes(4))


def test_the_largest_frame_passes_and_one_more_byte_is_our_bug() -> None:
    body = bytes(FRAME_BYTES_MAX - 1)
    assert Decoder().feed(frames.encode(Kind.DATA, body)) == [Frame(Kind.DATA, body)]
    with pytest.raises(ValueError, match="exceeds"):
        frames.encode(Kind.DATA, body + b"x")


def test_an_unknown_kind_is_refused_and_the_error_stays() -> None:
    decoder = Decoder()
    with pytest.raises(EnvelopeError, match="unknown kind 9"):
        decoder.feed(b"\0\0\0\x01\x09")
    with pytest.raises(EnvelopeError, match="unknown kind 9"):
        decoder.feed(frames.encode(Kind.END))
    decoder.finish()  # the stream's end says nothing new after an error


def test_the_end_inside_a_frame_is_noticed() -> None:
    decoder = Decoder()
    assert decoder.feed(frames.encode(Kind.DATA, b"abc")[:-1]) == []
    with pytest.raises(EnvelopeError, match="truncated"):
        decoder.finish()
    with pytest.raises(EnvelopeError, match="truncated"):
        decoder.feed(b"c")
