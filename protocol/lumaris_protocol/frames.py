"""Length-prefixed frames: how messages share a byte stream.

A frame is a 4-byte big-endian length, then a kind byte, then the body; the length counts the kind
and the body. The size is checked before a byte of the body is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import FRAME_BYTES_MAX

_HEADER = 4


class Kind(IntEnum):
    """What a frame's body is."""

    ENVELOPE = 1  # a signed document
    REFUSAL = 2  # JSON {code, message, hint, money_moved}: why the other side says no
    HEADER = 3  # JSON that opens an unsigned exchange (index query, blob transfer)
    DATA = 4  # raw bytes of a transfer
    END = 5  # empty: nothing more comes


@dataclass(frozen=True)
class Frame:
    """One decoded frame."""

    kind: Kind
    body: bytes


def encode(kind: Kind, body: bytes = b"") -> bytes:
    """The bytes of one frame. Raises ValueError when the body is over the limit: our own bug."""
    if len(body) + 1 > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(body)} bytes exceeds {FRAME_BYTES_MAX}")
    return (len(body) + 1).to_bytes(_HEADER, "big") + bytes([kind]) + body


class Decoder:
    """Turns received bytes into frames. After an error it stays in error."""

    def __init__(self, *, size_max: int = FRAME_BYTES_MAX) -> None:
        self._size_max = size_max
        self._buffer = bytearray()
        self._failed: EnvelopeError | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`. Raises EnvelopeError `oversize` or `malformed`."""
        if self._failed is not None:
            raise self._failed
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= _HEADER:
            size = int.from_bytes(self._buffer[:_HEADER], "big")
            if not 1 <= size <= self._size_max:
                self._fail("oversize" if size else "malformed", f"A frame of {size} bytes.")
            if len(self._buffer) < _HEADER + size:
                break
            kind = self._buffer[_HEADER]
            if kind not in Kind._value2member_map_:
                self._fail("malformed", f"A frame of unknown kind {kind}.")
            frames.append(Frame(Kind(kind), bytes(self._buffer[_HEADER + 1 : _HEADER + size])))
            del self._buffer[: _HEADER + size]
        return frames

    def finish(self) -> None:
        """The stream ended. Raises EnvelopeError `truncated` when that was inside a frame."""
        if self._failed is None and self._buffer:
            self._fail("truncated", "The stream ended inside a frame.")

    def _fail(self, code: str, message: str) -> None:
        self._failed = EnvelopeError(code, message)
        raise self._failed
