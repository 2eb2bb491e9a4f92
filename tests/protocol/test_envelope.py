"""The envelope against everything a stranger can do to its bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import envelope, ids, keys
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import ENVELOPE_BYTES_MAX
from tests.protocol import parties as p

KEY = p.key_of("envelope")
DATA = envelope.seal(KEY, p.NETWORK, "voucher", b'{"a":1}')


def field(number: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([number << 3 | 2, len(body)]) + body


def refused(data: bytes, code: str = "malformed") -> None:
    with pytest.raises(EnvelopeError) as caught:
        envelope.decode(data)
    assert caught.value.code == code


def parts() -> list[bytes]:
    found = envelope.decode(DATA)
    key = keys.encode_public_key(found.public_key)
    return [
        field(1, key),
        field(2, b"voucher"),
        field(3, found.payload),
        field(5, found.signature),
    ]


def test_it_opens_to_what_was_sealed() -> None:
    found = envelope.decode(DATA)
    found.verify(p.NETWORK)
    assert (found.signer, found.payload_type, found.payload) == (
        KEY.peer_id,
        "voucher",
        b'{"a":1}',
    )
    assert b"".join(parts()) == DATA
    assert found.data == DATA
    assert found.hash == ids.digest(DATA)


@pytest.mark.parametrize("length", range(len(DATA)))
def test_truncated_anywhere_it_is_malformed(length: int) -> None:
    refused(DATA[:length])


def test_bytes_after_it_are_refused() -> None:
    refused(DATA + b"\0")
    refused(DATA + field(5, b"x" * 64))


def test_fields_in_another_order_or_twice_are_refused() -> None:
    key, kind, payload, signature = parts()
    refused(kind + key + payload + signature)
    refused(key + kind + kind + payload + signature)
    refused(key + kind + payload + payload + signature)
    refused(key + kind + field(4, b"") + payload + signature)
    refused(key + payload + signature)


def test_a_length_must_be_a_minimal_varint_of_at_most_four_bytes() -> None:
    key, kind, payload, signature = parts()
    stretched = bytes([3 << 3 | 2, (len(payload) - 2) | 0x80, 0x00]) + payload[2:]
    refused(key + kind + stretched + signature)
    refused(key + kind + bytes([3 << 3 | 2]) + b"\xff" * 8)
    refused(key + kind + bytes([3 << 3 | 2]) + b"\xff\xff\xff\x7f" + payload)
    refused(key + kind + bytes([3 << 3 | 2]))


def test_size_is_checked_before_anything_is_parsed() -> None:
    refused(b"\xff" * (ENVELOPE_BYTES_MAX + 1), "oversize")
    with pytest.raises(EnvelopeError, match="oversize"):
        envelope.decode(DATA, size_max=len(DATA) - 1)
    assert envelope.decode(DATA, size_max=len(DATA)).data == DATA


@pytest.mark.parametrize("kind", [b"", b"x" * 65, "vouchér".encode()])
def test_the_type_is_a_short_ascii_name(kind: bytes) -> None:
    key, _, payload, signature = parts()
    refused(key + field(2, kind) + payload + signature)


def test_key_and_signature_must_be_ed25519() -> None:
    key, kind, payload, signature = parts()
    rsa = bytes([0x08, 0x00, 0x12, 0x20]) + bytes(32)
    refused(field(1, rsa) + kind + payload + signature)
    refused(field(1, bytes(35)) + kind + payload + signature)
    refused(key + kind + payload + field(5, bytes(63)))


@pytest.mark.parametrize("network", ["othernet", "testnet2", "Testnet"])
def test_a_signature_means_nothing_on_another_network(network: str) -> None:
    with pytest.raises(EnvelopeError, match="bad_signature"):
        envelope.decode(DATA).verify(network)


@pytest.mark.parametrize("position", range(len(DATA)))
def test_every_flipped_bit_is_noticed(position: int) -> None:
    changed = bytearray(DATA)
    changed[position] ^= 1
    with pytest.raises(EnvelopeError) as caught:
        envelope.decode(bytes(changed)).verify(p.NETWORK)
    assert caught.value.code in ("malformed", "bad_signature")


def test_type_and_payload_cannot_trade_bytes() -> None:
    """The signature covers lengths, so no two splits of the same bytes share one."""
    one = envelope.signed_bytes(p.NETWORK, "ab", b"c")
    assert one != envelope.signed_bytes(p.NETWORK, "a", b"bc")


@pytest.mark.parametrize("network", ["", "a/b", "x" * 65])
def test_a_network_name_is_short_and_without_a_slash(network: str) -> None:
    with pytest.raises(ValueError, match="network name"):
        envelope.signed_bytes(network, "voucher", b"")


def test_a_weak_key_verifies_nothing() -> None:
    """The all-zero point has small order: a lax verifier accepts any message under it."""
    assert not keys.verify(bytes(32), b"message", bytes(64))
    assert not keys.verify(bytes([1]) + bytes(31), b"m", bytes([1]) + bytes(63))
    assert not keys.verify(b"short", b"message", bytes(64))


def test_a_signature_has_one_form() -> None:
    """S and S + L verify alike in a lax verifier; then one document would have two hashes."""
    order = 2**252 + 27742317777372353535851937790883648493
    found = envelope.decode(DATA)
    s = int.from_bytes(found.signature[32:], "little") + order
    twin = found.signature[:32] + s.to_bytes(32, "little")
    signed = envelope.signed_bytes(p.NETWORK, found.payload_type, found.payload)
    assert keys.verify(found.public_key, signed, found.signature)
    assert not keys.verify(found.public_key, signed, twin)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_in_order(data: bytes) -> None:
    refused(data)


@pytest.mark.slow
@given(payload=st.binary(max_size=2000), kind=st.from_regex(r"[ -~]{1,64}", fullmatch=True))
def test_any_payload_goes_round(payload: bytes, kind: str) -> None:
    data = envelope.seal(KEY, p.NETWORK, kind, payload)
    found = envelope.decode(data)
    found.verify(p.NETWORK)
    assert (found.payload, found.payload_type) == (payload, kind)
    again = [keys.encode_public_key(found.public_key), kind.encode(), payload, found.signature]
    assert all(part in data for part in again)


@given(st.binary(min_size=1, max_size=8), st.integers(min_value=0, max_value=len(DATA)))
def test_inserted_bytes_are_noticed(extra: bytes, position: int) -> None:
    with pytest.raises(EnvelopeError):
        envelope.decode(DATA[:position] + extra + DATA[position:]).verify(p.NETWORK)
