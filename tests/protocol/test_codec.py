"""Decoding documents: every check, and every way JSON can be read two ways."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import codec, envelope, limits
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.execution import LogChunk, WorkOrder
from lumaris_protocol.messages.payment import Voucher
from lumaris_protocol.registry import MESSAGES
from tests.protocol import parties as p
from tests.protocol.samples import sample, samples

VOUCHER, KEY = samples()["voucher"]
PAYLOAD = codec.encode_payload(VOUCHER)


def sealed(payload: bytes, kind: type[Message] = Voucher) -> bytes:
    return envelope.seal(p.BUYER_SESSION, p.NETWORK, kind.TYPE, payload)


def refused(payload: bytes, code: str, kind: type[Message] = Voucher) -> None:
    with pytest.raises(EnvelopeError) as caught:
        codec.open_signed(sealed(payload, kind), kind, network=p.NETWORK)
    assert caught.value.code == code


def with_total(text: str) -> bytes:
    return PAYLOAD.replace(b'"total_nanos":500', f'"total_nanos":{text}'.encode())


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_goes_round(kind: str) -> None:
    signed = sample(kind)
    again = codec.open_signed(signed.data, MESSAGES[kind], network=p.NETWORK, signer=signed.signer)
    assert again == signed
    assert again.hash == signed.hash


@pytest.mark.parametrize("kind", MESSAGES)
def test_an_unknown_field_is_refused_in_every_message(kind: str) -> None:
    message, _ = samples()[kind]
    payload = codec.encode_payload(message)
    refused(payload[:-1] + b',"x":1}', "unknown_field", MESSAGES[kind])


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_repeated_key_is_refused_in_every_message(kind: str) -> None:
    message, _ = samples()[kind]
    payload = codec.encode_payload(message)
    first = payload[1 : payload.index(b",")]
    refused(payload[:-1] + b"," + first + b"}", "malformed", MESSAGES[kind])


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("position", [0.2, 0.5, 0.9])
def test_a_truncated_payload_is_refused_in_every_message(kind: str, position: float) -> None:
    payload = codec.encode_payload(samples()[kind][0])
    refused(payload[: int(len(payload) * position)], "malformed", MESSAGES[kind])


def test_a_repeated_key_is_refused_however_it_is_spelt() -> None:
    refused(PAYLOAD[:-1] + b',"total_nanos":9}', "malformed")
    refused(PAYLOAD[:-1] + b',"total\\u005fnanos":9}', "malformed")
    refused(b'{"total_nanos":9,' + PAYLOAD[1:], "malformed")


def test_a_repeated_key_is_refused_inside_parts_and_maps() -> None:
    payload = codec.encode_payload(samples()["work_order"][0])
    refused(payload.replace(b'{"A":"1"}', b'{"A":"1","A":"2"}'), "malformed", WorkOrder)
    refused(payload.replace(b'"wall_s":60', b'"wall_s":60,"wall_s":61'), "malformed", WorkOrder)


def test_other_spellings_of_one_message_are_read_alike() -> None:
    """The payload is never re-encoded to verify, so white space and order are the signer's."""
    text = json.dumps(dict(reversed(json.loads(PAYLOAD).items())), indent=3).encode()
    signed = codec.open_signed(sealed(text), Voucher, network=p.NETWORK)
    assert signed.message == VOUCHER
    assert signed.hash != sample("voucher").hash


@pytest.mark.parametrize("text", ["5.0", "5e0", "true", '"5"', "null", "-1", "[5]", "1e400"])
def test_only_integers_in_range_are_integers(text: str) -> None:
    refused(with_total(text), "unknown_field")


@pytest.mark.parametrize("text", ["9007199254740992", "1" * 1500, "-9223372036854775809"])
def test_a_big_integer_is_refused(text: str) -> None:
    refused(with_total(text), "unknown_field")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "+5", "05", "0x5", "", "5,"])
def test_what_is_not_json_is_malformed(text: str) -> None:
    refused(with_total(text), "malformed")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xef\xbb\xbf" + PAYLOAD,
        PAYLOAD + b"{}",
        PAYLOAD.replace(b'"ses_', b'"ses_\xff'),
        PAYLOAD.replace(b'"ses_', b'"\\ud800'),
        b"null",
    ],
)
def test_hostile_payloads_are_refused_quietly(payload: bytes) -> None:
    kind = Voucher if len(payload) < Voucher.SIZE_MAX // 2 else LogChunk
    with pytest.raises(EnvelopeError) as caught:
        codec.open_signed(sealed(payload, kind), kind, network=p.NETWORK)
    assert caught.value.code in ("malformed", "unknown_field")


def test_nesting_inside_a_field_is_refused() -> None:
    chunk = codec.encode_payload(samples()["log_chunk"][0])
    deep = chunk.replace(b'"offset":0', b'"offset":' + b"[" * 50_000)
    assert len(deep) > 50_000
    refused(deep, "unknown_field", LogChunk)


@pytest.mark.parametrize("field", ["session", "prev"])
def test_no_line_break_hides_behind_an_id(field: str) -> None:
    value = getattr(VOUCHER, field)
    refused(PAYLOAD.replace(value.encode(), value.encode() + b"\\n"), "unknown_field")


def test_no_line_break_hides_behind_a_peer_a_name_or_a_currency() -> None:
    payload = codec.encode_payload(samples()["advert"][0])
    for text in (p.SELLER.peer_id, "eu-north", "TEST"):
        changed = payload.replace(f'"{text}"'.encode(), f'"{text}\\n"'.encode())
        assert changed != payload
        refused(changed, "unknown_field", Advert)


def test_a_document_of_another_type_is_refused_before_its_signature() -> None:
    data = bytearray(sample("cancel").data)
    data[-1] ^= 1
    with pytest.raises(EnvelopeError, match="wrong_type"):
        codec.open_signed(bytes(data), Voucher, network=p.NETWORK)


def test_a_type_name_is_part_of_what_is_signed() -> None:
    data = sample("voucher").data.replace(b"\x12\x07voucher", b"\x12\x05meter")
    with pytest.raises(EnvelopeError, match="bad_signature"):
        codec.open_signed(data, MESSAGES["meter"], network=p.NETWORK)


def test_the_signer_must_be_the_expected_one() -> None:
    with pytest.raises(EnvelopeError, match="wrong_signer"):
        codec.open_signed(
            sample("voucher").data, Voucher, network=p.NETWORK, signer=p.STRANGER.peer_id
        )


def test_another_network_is_a_bad_signature() -> None:
    with pytest.raises(EnvelopeError, match="bad_signature"):
        codec.open_signed(sample("voucher").data, Voucher, network="othernet")


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_type_has_its_own_size_limit(kind: str) -> None:
    with pytest.raises(EnvelopeError, match="oversize"):
        codec.open_signed(bytes(MESSAGES[kind].SIZE_MAX + 1), MESSAGES[kind], network=p.NETWORK)
    # Evidence encloses session documents; it travels over HTTP alone and never in a frame.
    encloses = kind in ("dispute_open", "dispute_evidence")
    assert encloses or MESSAGES[kind].SIZE_MAX < limits.FRAME_BYTES_MAX


def test_what_we_sign_keeps_its_own_bounds() -> None:
    broken = msgspec.structs.replace(samples()["log_chunk"][0], data=bytes(40_000))
    with pytest.raises(ValueError, match="breaks its own bounds"):
        codec.sign(broken, p.SELLER_SESSION, p.NETWORK)
    assert isinstance(broken, LogChunk)
    with pytest.raises(ValueError, match="exceeds"):
        p.advert(addresses=("/ip4/" + "1" * 250,) * 8)


def test_the_largest_log_chunk_fits_its_envelope() -> None:
    chunk = msgspec.structs.replace(
        samples()["log_chunk"][0], data=b"\xff" * limits.LOG_CHUNK_BYTES_MAX
    )
    assert len(codec.sign(chunk, p.SELLER_SESSION, p.NETWORK).data) < limits.ENVELOPE_BYTES_MAX


def test_validity_allows_for_clocks_sixty_seconds_apart() -> None:
    def check(issued_at: int, expires_at: int) -> str:
        try:
            codec.check_times(issued_at=issued_at, expires_at=expires_at, now=1000.0, what="thing")
        except EnvelopeError as error:
            return error.code
        return ""

    assert check(1060, 2000) == ""
    assert check(1061, 2000) == "not_yet_valid"
    assert check(0, 940) == ""
    assert check(0, 939) == "expired"
    assert check(1001, 1000) == "malformed"


@given(st.binary(max_size=200))
def test_random_payloads_never_get_through(payload: bytes) -> None:
    with pytest.raises(EnvelopeError):
        codec.decode_payload(payload, Voucher)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.mark.slow
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_field_of_any_other_shape_is_refused_or_read_back_alike(
    kind: str, data: st.DataObject
) -> None:
    content = json.loads(codec.encode_payload(samples()[kind][0]))
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(_JSON)
    payload = json.dumps(content, allow_nan=True).encode()
    try:
        message = codec.decode_payload(payload, MESSAGES[kind])
    except EnvelopeError:
        return
    again = codec.decode_payload(codec.encode_payload(message), MESSAGES[kind])
    assert again == message
