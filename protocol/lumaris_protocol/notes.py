"""Signed notes (C2SP signed-note) and timestamped cosignatures on them (C2SP tlog-cosignature).

A note is text, an empty line, and signature lines `— <key name> base64(key id || signature)`. A key
is known by its name and its id together; lines of other keys are passed over, but a line that names
a known key and does not verify spoils the whole note.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from lumaris_protocol import keys
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CHECKPOINT_CHARS_MAX, NOTE_SIGNATURES_MAX

ED25519: Final = 0x01
COSIGNATURE: Final = 0x04
_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_TIME_MAX: Final = (1 << 63) - 1
_DASH: Final = "\u2014 "


@dataclass(frozen=True)
class NoteKey:
    """A public key under a name, for one kind of signature (`ED25519` or `COSIGNATURE`)."""

    name: str
    kind: int
    public_key: bytes

    @property
    def id(self) -> bytes:
        """The four bytes that stand before its signatures."""
        data = self.name.encode() + b"\n" + bytes([self.kind]) + self.public_key
        return hashlib.sha256(data).digest()[:_ID_BYTES]

    @property
    def vkey(self) -> str:
        """The key as text: `<name>+<hex id>+<base64 of kind and key>`."""
        material = base64.b64encode(bytes([self.kind]) + self.public_key).decode()
        return f"{self.name}+{self.id.hex()}+{material}"


@dataclass(frozen=True)
class Line:
    """One signature line."""

    name: str
    key_id: bytes
    data: bytes


@dataclass(frozen=True)
class Note:
    """A note taken apart, not yet verified. `text` ends in a line break."""

    text: str
    lines: tuple[Line, ...]


def log_key(network: str, public_key: bytes) -> NoteKey:
    """The key of a coordinator as the signer of its log."""
    return NoteKey(log_origin(network), ED25519, public_key)


def witness_key(network: str, peer: str) -> NoteKey:
    """The key of a peer as a witness. Raises ValueError for what is no peer id."""
    name = f"lumaris.{network}/witness/{peer}"
    return NoteKey(name, COSIGNATURE, keys.public_key_of(peer))


def witness_of(network: str, name: str) -> NoteKey | None:
    """The witness that a key name of this network says it is, or None."""
    start = f"lumaris.{network}/witness/"
    try:
        return witness_key(network, name[len(start) :]) if name.startswith(start) else None
    except ValueError:
        return None


def log_origin(network: str) -> str:
    """The name of a network's receipts log."""
    return f"lumaris.{network}/log"


def parse_vkey(text: str) -> NoteKey:
    """A verifier key from its text. Raises ValueError for another form, kind, id or length."""
    name, _, rest = text.partition("+")
    shown_id, _, material = rest.partition("+")
    data = _decode64(material)
    known = data is not None and len(data) == 33 and data[0] in (ED25519, COSIGNATURE)
    if data is None or not known or not is_name(name):
        raise ValueError("not a verifier key of a kind known here")
    key = NoteKey(name, data[0], data[1:])
    if shown_id != key.id.hex():
        raise ValueError("the verifier key's id is not that of its name and key")
    return key


def is_name(text: str) -> bool:
    """Whether a text can name a key: not empty, no spaces, no plus, no control characters."""
    return bool(text) and not any(c.isspace() or c == "+" or ord(c) < 32 for c in text)


def parse(note: str) -> Note:
    """Take a note apart. Raises EnvelopeError: `oversize` or `malformed`."""
    if len(note) > CHECKPOINT_CHARS_MAX:
        raise EnvelopeError("oversize", "The note is too long.")
    try:
        note.encode()
    except UnicodeEncodeError:
        raise EnvelopeError("malformed", "The note is no Unicode text.") from None
    text, separator, signatures = note.rpartition("\n\n")
    shown = signatures.split("\n")
    well_formed = text and separator and shown[-1] == "" and len(shown) >= 2
    if not well_formed or any(ord(c) < 32 and c != "\n" for c in note):
        raise EnvelopeError("malformed", "Not a signed note.")
    if len(shown) - 1 > NOTE_SIGNATURES_MAX:
        raise EnvelopeError("oversize", "The note has too many signatures.")
    return Note(f"{text}\n", tuple(_parse_line(line) for line in shown[:-1]))


def sign(text: str, key: KeyPair, *, name: str) -> str:
    """The signature line of a plain Ed25519 signature."""
    signer = NoteKey(name, ED25519, key.public_key)
    return _line(signer, key.sign(text.encode()))


def cosign(text: str, key: KeyPair, *, name: str, now: int) -> str:
    """The signature line of a cosignature of POSIX time `now` in whole seconds."""
    signer = NoteKey(name, COSIGNATURE, key.public_key)
    return _line(signer, now.to_bytes(_TIME_BYTES, "big") + key.sign(_cosigned(text, now)))


def verify(note: Note, key: NoteKey) -> int | None:
    """When the key signed the note: the time of its newest cosignature, 0 for a plain signature.

    None when there is no line of this key. Raises EnvelopeError `bad_signature` for a line that
    names the key and is not its signature.
    """
    found: int | None = None
    for line in note.lines:
        if line.name == key.name and line.key_id == key.id:
            at = _signed_at(note.text, line.data, key)
            if at is None:
                raise EnvelopeError("bad_signature", f"A signature of {key.name} is not valid.")
            found = max(at, found or 0)
    return found


def line_of(line: Line) -> str:
    """A signature line as text, with its line break."""
    data = base64.b64encode(line.key_id + line.data).decode()
    return f"{_DASH}{line.name} {data}\n"


def _signed_at(text: str, data: bytes, key: NoteKey) -> int | None:
    if key.kind == ED25519:
        return 0 if keys.verify(key.public_key, text.encode(), data) else None
    at = int.from_bytes(data[:_TIME_BYTES], "big")
    good = at <= _TIME_MAX and keys.verify(key.public_key, _cosigned(text, at), data[_TIME_BYTES:])
    return at if good else None


def _cosigned(text: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


def _line(key: NoteKey, signature: bytes) -> str:
    if not is_name(key.name):
        raise ValueError("a key name has no spaces and no plus")
    return line_of(Line(key.name, key.id, signature))


def _parse_line(text: str) -> Line:
    name, separator, shown = text.removeprefix(_DASH).partition(" ")
    data = _decode64(shown)
    if (
        not text.startswith(_DASH)
        or not separator
        or not is_name(name)
        or data is None
        or len(data) <= _ID_BYTES
    ):
        raise EnvelopeError("malformed", "A line of the note is no signature.")
    return Line(name, data[:_ID_BYTES], data[_ID_BYTES:])


def _decode64(text: str) -> bytes | None:
    """The bytes of base64 text in its one proper spelling, or None."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if base64.b64encode(data).decode() == text else None
