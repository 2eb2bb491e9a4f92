"""The directory's live adverts on disk, so that a restarted peer matches before it hears any.

What the file says is trusted no more than what a stranger gossips: every document goes through the
directory's gate again, which drops what has expired meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lumaris_overlay.private_files import write_private_file
from lumaris_protocol import frames
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import ADVERT_BYTES_MAX, DIRECTORY_ADVERTS_MAX

# A full directory is 40 MB: written this often at most, that is 0.7 MB/s.
_SPACING_S = 60.0
_READ_BYTES = 1 << 20


class AdvertFile:
    """A file of adverts, or of other documents. Its calls block for as long as the disk takes."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        document_bytes_max: int = ADVERT_BYTES_MAX,
        documents_max: int = DIRECTORY_ADVERTS_MAX,
    ) -> None:
        self._path, self._clock = path, clock
        self._frame_bytes_max, self._documents_max = document_bytes_max + 16, documents_max
        self._written_at: float | None = None

    def load(self) -> list[bytes]:
        """What was saved, unchecked but bounded; nothing when the file is missing or damaged.

        Of a damaged file, the blocks before the damage are returned.
        """
        decoder = frames.Decoder(size_max=self._frame_bytes_max)
        bytes_max = self._documents_max * self._frame_bytes_max
        found: list[bytes] = []
        try:
            with self._path.open("rb") as file:
                for _ in range(0, bytes_max, _READ_BYTES):
                    data = file.read(_READ_BYTES)
                    if not data:
                        break
                    fed = decoder.feed(data)
                    found += [frame.body for frame in fed if frame.kind == Kind.ENVELOPE]
        except (OSError, EnvelopeError):
            pass
        return found[: self._documents_max]

    def save(self, documents: Sequence[bytes], *, now: bool = False) -> bool:
        """Replace the file, unless that was done a moment ago; whether it was written.

        With `now` it is written in any case: the program ends. Raises OSError.
        """
        at = self._clock()
        if not now and self._written_at is not None and at < self._written_at + _SPACING_S:
            return False
        self._written_at = at  # a disk that fails is not tried more often than one that works
        kept = documents[: self._documents_max]
        write_private_file(self._path, b"".join(frames.encode(Kind.ENVELOPE, doc) for doc in kept))
        return True
