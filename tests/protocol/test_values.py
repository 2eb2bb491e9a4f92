"""Money, ids, keys, errors and codes."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import catalog, codes, ids, keys, money
from lumaris_protocol.errors import EnvelopeError, InvalidTransition, LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import NANOS_MAX
from tests.protocol import parties as p

# Public keys with the peer ids that the libp2p specification and its implementations give them.
KNOWN_PEER_IDS = {
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e": (
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    ),
}


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("0", 0),
        ("0.02", 20_000_000),
        ("1", 10**9),
        ("1e-9", 1),
        ("1.000000000000", 10**9),
        ("9007199", 9007199 * 10**9),
        ("1e3", 10**12),
        ("-0", 0),
        ("0e999999", 0),
    ],
)
def test_credits_are_read_exactly(text: str, nanos: int) -> None:
    assert money.parse_credits(text) == nanos


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1,5", "0x1", "NaN", "sNaN", "Infinity", "-1", "-1e-9", "1e-10"),
        *("9007200", "1e999999999", "1e-999999999", "1.0000000001", "1." + "0" * 40 + "1"),
    ],
)
def test_what_is_not_an_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"credits|range|nano"):
        money.parse_credits(text)


@given(st.integers(min_value=0, max_value=9_007_199 * 10**9))
def test_amounts_go_round(nanos: int) -> None:
    text = money.format_credits(nanos)
    assert re.fullmatch(r"\d+\.\d{9}", text)
    assert money.parse_credits(text) == nanos
    if nanos:
        assert money.format_credits(-nanos) == f"-{text}"


@given(st.integers(min_value=0, max_value=NANOS_MAX), st.integers(min_value=0, max_value=10_000))
def test_a_split_loses_nothing_and_floors_the_fee(amount: int, fee_bps: int) -> None:
    seller, fee = money.split_fee(amount, fee_bps=fee_bps)
    assert seller + fee == amount
    assert 0 <= amount * fee_bps - fee * 10_000 < 10_000


@pytest.mark.parametrize(("amount", "fee_bps"), [(-1, 0), (1, -1), (1, 10_001)])
def test_a_split_out_of_range_is_refused(amount: int, fee_bps: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        money.split_fee(amount, fee_bps=fee_bps)


@pytest.mark.parametrize("kind", ids.PREFIXES)
def test_ids_have_their_prefix_and_form(kind: str) -> None:
    name = ids.make_id(kind, bytes(range(15)))
    assert re.fullmatch(ids.ID_PATTERN, name)
    assert name.startswith(ids.PREFIXES[kind] + "_")
    assert ids.derive_id(kind, b"seed") == ids.derive_id(kind, b"seed")
    assert ids.derive_id(kind, b"seed") != ids.derive_id(kind, b"seeds")


def test_ids_take_exactly_their_entropy() -> None:
    for size in (0, 14, 16):
        with pytest.raises(ValueError, match="15 random bytes"):
            ids.make_id("job", bytes(size))
    with pytest.raises(KeyError):
        ids.make_id("nothing", bytes(15))
    text = ids.make_id("job", b"\xff" * 15).removeprefix("job_")
    assert base64.b32decode(text.upper()) == b"\xff" * 15


def test_a_digest_is_sha256() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert ids.digest(b"") == f"sha256:{empty}"
    assert re.match(ids.DIGEST_PATTERN, ids.digest(b""))
    assert not re.match(ids.DIGEST_PATTERN, ids.digest(b"") + "\n")
    assert not re.match(ids.ID_PATTERN, p.id_of("job", "1") + "\n")


@pytest.mark.parametrize(("public", "peer_id"), KNOWN_PEER_IDS.items())
def test_peer_ids_are_those_of_libp2p(public: str, peer_id: str) -> None:
    assert keys.peer_id_of(bytes.fromhex(public)) == peer_id
    assert keys.public_key_of(peer_id).hex() == public


def test_signatures_are_those_of_rfc_8032() -> None:
    key = KeyPair(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public_key.hex() == (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    )
    signature = key.sign(b"")
    assert signature.hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert keys.verify(key.public_key, b"", signature)


@given(st.binary(min_size=32, max_size=32))
def test_peer_ids_go_round(seed: bytes) -> None:
    key = KeyPair(seed)
    assert key.seed == seed
    assert keys.public_key_of(key.peer_id) == key.public_key
    assert key.peer_id.startswith("12D3KooW")
    encoded = keys.encode_public_key(key.public_key)
    assert keys.decode_public_key(encoded) == key.public_key


@pytest.mark.parametrize(
    "text",
    [
        *("", "12D3KooW", "1" * 52, "z" * 52, "0" * 52, p.BUYER.peer_id + "1"),
        *("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "Q" + p.BUYER.peer_id[1:]),
        *(p.BUYER.peer_id[:-1] + "é", p.BUYER.peer_id[:-1] + "0", p.BUYER.peer_id + "\n"),
    ],
)
def test_what_is_not_an_ed25519_peer_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"peer id|base58"):
        keys.public_key_of(text)


def test_keys_have_their_lengths() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keys.peer_id_of(bytes(31))
    assert keys.decode_public_key(bytes(36)) is None
    assert keys.decode_public_key(b"\x08\x01\x12\x20" + bytes(31)) is None


def test_base58_keeps_leading_zeros() -> None:
    assert keys._base58_encode(b"\0\0a") == "112g"
    assert keys._base58_decode("112g") == b"\0\0a"
    assert keys._base58_encode(b"") == ""
    assert keys._base58_encode(b"Hello World!") == "2NEpo7TZRRrLZSi2U"


def test_an_error_says_what_happened_and_what_to_do() -> None:
    plain = EnvelopeError("expired")
    entry = codes.CODES["expired"]
    assert (plain.message, plain.hint, plain.exit_code) == (entry.meaning, entry.hint, 9)
    told = LumarisError("no_funds", "Two short.", hint="Deposit.", money_moved=True)
    assert str(told) == "no_funds: Two short."
    assert told.to_json() == {
        "code": "no_funds",
        "message": "Two short.",
        "hint": "Deposit.",
        "money_moved": True,
    }
    with pytest.raises(KeyError):
        LumarisError("no such code")


def test_a_bug_report_carries_the_story() -> None:
    error = InvalidTransition("job", "running", "prepare", ("prepare", "start"))
    assert "job in running cannot take prepare (after prepare, start)" in str(error)
    assert "(after" not in str(InvalidTransition("job", "running", "prepare"))
    assert error.exit_code == 1


@pytest.mark.parametrize("code", codes.CODES)
def test_every_code_is_a_sentence_with_a_known_exit(code: str) -> None:
    entry = codes.CODES[code]
    assert re.fullmatch(r"[a-z_0-9]+", code)
    assert entry.meaning.endswith(".")
    assert entry.hint == "" or entry.hint[-1] in ".`", code
    assert entry.exit_code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 125, 130)


def test_catalog_names_are_pinned() -> None:
    for name, entry in catalog.CATALOG.items():
        assert entry.name == name
        assert re.fullmatch(ids.DIGEST_PATTERN, entry.digest)
