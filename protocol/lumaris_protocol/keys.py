"""Ed25519 keys and the libp2p peer ids that follow from them.

A peer id is the base58btc text of the identity multihash of the protobuf-encoded public key
(libp2p peer-ids specification); for Ed25519 keys the multihash carries the whole key, so the key
can be read back out of the id.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NewType

from nacl.bindings import crypto_sign_BYTES, crypto_sign_open, crypto_sign_PUBLICKEYBYTES
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

PeerId = NewType("PeerId", str)

# PublicKey { Type = 1 (Ed25519), Data = 32 bytes } and, around it, the identity multihash header.
_KEY_PREFIX: Final = bytes([0x08, 0x01, 0x12, 0x20])
_IDENTITY_PREFIX: Final = bytes([0x00, 0x24])
_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_CHARS: Final = 52


class KeyPair:
    """A signing key with its peer id. `seed` is 32 secret random bytes from the caller."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.public_key: bytes = self._key.verify_key.encode()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes; for the key file and the libp2p host only."""
        return self._key.encode()

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `data`."""
        return self._key.sign(data).signature


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is the Ed25519 signature of `data` under `public_key`."""
    # The library itself reads as many bytes as these should have.
    if len(public_key) != crypto_sign_PUBLICKEYBYTES or len(signature) != crypto_sign_BYTES:
        return False
    try:
        crypto_sign_open(signature + data, public_key)
    except BadSignatureError:
        return False
    return True


def encode_public_key(public_key: bytes) -> bytes:
    """The protobuf form libp2p uses for an Ed25519 public key (36 bytes)."""
    return _KEY_PREFIX + public_key


def decode_public_key(data: bytes) -> bytes | None:
    """The 32 key bytes of libp2p's protobuf form, or None when it is anything else."""
    if len(data) != 36 or not data.startswith(_KEY_PREFIX):
        return None
    return data[4:]


@lru_cache(maxsize=4096)  # the same few parties sign everything; base58 costs as much as hashing
def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte Ed25519 public key. Raises ValueError for another length."""
    if len(public_key) != 32:
        raise ValueError("an Ed25519 public key has 32 bytes")
    return PeerId(_base58_encode(_IDENTITY_PREFIX + encode_public_key(public_key)))


def public_key_of(peer_id: str) -> bytes:
    """The public key inside a peer id. Raises ValueError when it is not an Ed25519 peer id."""
    if len(peer_id) != _PEER_ID_CHARS:
        raise ValueError("not an Ed25519 peer id")
    raw = _base58_decode(peer_id)
    key = decode_public_key(raw[2:]) if raw.startswith(_IDENTITY_PREFIX) else None
    if key is None:
        raise ValueError("not an Ed25519 peer id")
    return key


def _base58_encode(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def _base58_decode(text: str) -> bytes:
    number = 0
    for char in text:
        digit = _ALPHABET.find(char)
        if digit < 0:
            raise ValueError("not base58 text")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
