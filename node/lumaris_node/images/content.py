"""The parts of images on disk, by hash: configurations and layers, as they are fetched and given.

`blobs/` holds them, `parts/` what is on its way, `images/` one record for each image that says
which parts it has. The command line and a running node may use one directory at a time each: a
part is whole or absent, and a record whose parts are gone counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from lumaris_node.images.archive import write_archive
from lumaris_overlay.image_archive import CONFIG_BYTES_MAX, ImageArchive, check_digest, parse_config
from lumaris_overlay.private_files import write_private_file
from lumaris_overlay.registry import Blob
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import IMAGE_BYTES_MAX, LAYERS_MAX, MIB
from lumaris_protocol.messages.base import Digest
from lumaris_protocol.messages.execution import ImageSource

CONTENT_BYTES_DEFAULT: Final = IMAGE_BYTES_MAX
# Images that the directory knows of; more are forgotten, the longest unused first.
_IMAGES_MAX = 256
_RECORD_BYTES_MAX = 64 * 1024
_SPARE_BYTES = 256 * MIB  # left to the rest of the machine
_PART_S_MAX = 24 * 3600
IMPORT_PREFIX: Final = ".import-"  # folders of a command that takes in an image
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer as it is kept: the hash of its bytes, and how many they are."""

    digest: Digest
    size: Annotated[int, Meta(ge=0, le=IMAGE_BYTES_MAX)]


class ImageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An image whose parts are kept. `image` is its configuration's hash.

    `share`: other sellers may have it. `keep`: its owner put it here, so it is never dropped.
    """

    image: Digest
    config_bytes: Annotated[int, Meta(ge=0, le=CONFIG_BYTES_MAX)]
    layers: Annotated[tuple[Piece, ...], Meta(min_length=1, max_length=LAYERS_MAX)]
    source: ImageSource = ""
    share: bool = False
    keep: bool = False

    @property
    def parts(self) -> tuple[Piece, ...]:
        """The configuration, then the layers, the lowest first."""
        return (Piece(self.image, self.config_bytes), *self.layers)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in set(self.parts))


class ContentStore:
    """Parts and records below `directory`, within `bytes_max` by least use. Its methods block."""

    def __init__(self, directory: Path, *, bytes_max: int = CONTENT_BYTES_DEFAULT) -> None:
        self.directory, self._bytes_max = directory, bytes_max
        self._blobs, self._parts, self._images = (
            directory / name for name in ("blobs", "parts", "images")
        )
        self._pins: Counter[str] = Counter()
        self._lock = threading.RLock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        for folder in (self._blobs, self._parts, self._images):
            folder.mkdir(mode=0o700, exist_ok=True)
        # What peers sent of a part lies beside it until it is whole.
        for left in (*self._parts.iterdir(), *self._blobs.glob(".*")):
            if _used_at(left) < time.time() - _PART_S_MAX:
                left.unlink(missing_ok=True)
        for left in directory.glob(f"{IMPORT_PREFIX}*"):
            if _used_at(left) < time.time() - _PART_S_MAX:
                shutil.rmtree(left, ignore_errors=True)

    # --- parts ---

    def has(self, digest: str) -> bool:
        """Whether a part is here, whole."""
        return self.path(digest).exists()

    def path(self, digest: str) -> Path:
        """Where a part is, or will be. Raises LumarisError `bad_image` for no digest."""
        return self._blobs / check_digest(digest).removeprefix("sha256:")

    def part(self, digest: str) -> Path:
        """Where a download of it grows, and is found again after a stop."""
        return self._parts / check_digest(digest).removeprefix("sha256:")

    def finish(self, digest: str, *, check: Callable[[], object] = lambda: None) -> None:
        """Keep a whole download. Its file is hashed: what was written may not be what is there.

        `check` is called often and raises to stop the work. Raises LumarisError `bad_image`; the
        download is gone then.
        """
        part = self.part(digest)
        if _hash(part, check) != digest:
            part.unlink(missing_ok=True)
            raise LumarisError("bad_image", "A part of the image does not match its hash.")
        part.replace(self.path(digest))

    def drop_wrong(self, record: ImageRecord) -> bool:
        """Remove the parts of an image whose bytes are not those of their hash; whether any was."""
        wrong = [part for part in set(record.parts) if self._is_wrong(part.digest)]
        for part in wrong:
            self.path(part.digest).unlink(missing_ok=True)
        return bool(wrong)

    def add(self, data: bytes) -> str:
        """Keep a small part; its digest."""
        digest = ids.digest(data)
        if not self.has(digest):
            write_private_file(self.path(digest), data)
        return digest

    @contextlib.contextmanager
    def pin(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep these parts while the context lasts, whether they are here yet or not."""
        held = list(digests)
        with self._lock:
            self._pins.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(held)
                self._pins += Counter()  # forgets those at zero

    def make_room(self, size: int) -> None:
        """Drop what was used longest ago until so many more bytes fit.

        Raises LumarisError `disk_short`, and drops nothing then.
        """
        with self._lock:
            kept = {
                part.digest for record in self.records() if record.keep for part in record.parts
            }
            files = [(file, _size(file)) for file in sorted(self._files(), key=_used_at)]
            free = shutil.disk_usage(self.directory).free - _SPARE_BYTES
            short = max(sum(held for _, held in files) + size - self._bytes_max, size - free)
            dropped = []
            for file, held in files:
                digest = f"sha256:{file.name}"
                if short > 0 and digest not in kept and not self._pins[digest]:
                    dropped.append(file)
                    short -= held
            if short > 0:
                raise LumarisError("disk_short", "There is no room for the image.")
            for file in dropped:
                file.unlink(missing_ok=True)

    # --- images ---

    def save(self, record: ImageRecord) -> None:
        """Remember an image whose parts are here."""
        write_private_file(self._record(record.image), msgspec.json.encode(record))
        with self._lock:
            files = sorted(self._images.iterdir(), key=_used_at)
            for file in files[: max(0, len(files) - _IMAGES_MAX)]:
                found = self._read(file)
                if found is None or not found.keep:
                    file.unlink(missing_ok=True)

    def find(self, image: str) -> ImageRecord | None:
        """The record of an image all of whose parts are here; it counts as used now."""
        record = self._read(self._record(image))
        if record is None or not all(self.has(part.digest) for part in record.parts):
            return None
        for path in (self._record(image), *(self.path(part.digest) for part in record.parts)):
            with contextlib.suppress(OSError):
                os.utime(path)
        return record

    def records(self) -> tuple[ImageRecord, ...]:
        """The images whose parts are here, the one used last first."""
        files = sorted(self._images.iterdir(), key=_used_at, reverse=True)
        found = [self._read(file) for file in files if _HEX.match(file.stem)]
        return tuple(
            record
            for record in found
            if record is not None and all(self.has(part.digest) for part in record.parts)
        )

    def remove(self, image: str) -> bool:
        """Forget an image, and the parts that no other image has; whether it was here."""
        with self._lock:
            path = self._record(image)
            record = self._read(path)
            path.unlink(missing_ok=True)
            if record is None:
                return False
            others = {part.digest for other in self.records() for part in other.parts}
            for part in record.parts:
                if part.digest not in others and not self._pins[part.digest]:
                    self.path(part.digest).unlink(missing_ok=True)
            return True

    def assemble(
        self, record: ImageRecord, target: Path, *, check: Callable[[], object] = lambda: None
    ) -> None:
        """Write an image's archive from its parts. Raises LumarisError `bad_image`.

        `check` is called often and raises to stop the work.
        """
        config = self.path(record.image).read_bytes()
        diff_ids = parse_config(config).diff_ids
        if len(diff_ids) != len(record.layers):
            raise LumarisError("bad_image", "The image lacks layers.")
        layers = [self.path(layer.digest) for layer in record.layers]
        write_archive(target, config, layers, diff_ids, check=check)

    def take_archive(self, archive: Path, *, share: bool) -> ImageRecord:
        """Keep an image that its owner has as a file; every layer's hash is checked.

        Raises LumarisError `bad_image`, `unsafe_archive`, `disk_short`.
        """
        found = ImageArchive(archive)
        self.make_room(sum(layer.size for layer in found.layers) + len(found.raw_config))
        names = []
        with self.pin([found.digest]):
            for number, layer in enumerate(found.layers):
                with found.open_layer(layer):
                    pass  # at its end the layer's hash is checked
                draft = self._parts / f".{os.getpid()}.{number}"
                try:
                    digest = _copy_range(archive, draft, layer.offset, layer.size)
                    draft.replace(self.path(digest))
                finally:
                    draft.unlink(missing_ok=True)
                names.append(Piece(digest, layer.size))
            self.add(found.raw_config)
            record = ImageRecord(
                image=found.digest,
                config_bytes=len(found.raw_config),
                layers=tuple(names),
                share=share,
                keep=True,
            )
            self.save(record)
        return record

    def _is_wrong(self, digest: str) -> bool:
        try:
            return _hash(self.path(digest)) != digest
        except FileNotFoundError:
            return False

    def _record(self, image: str) -> Path:
        return self._images / f"{check_digest(image).removeprefix('sha256:')}.json"

    def _read(self, path: Path) -> ImageRecord | None:
        try:
            with path.open("rb") as file:
                return msgspec.json.decode(file.read(_RECORD_BYTES_MAX), type=ImageRecord)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _files(self) -> list[Path]:
        both = (*self._blobs.iterdir(), *self._parts.iterdir())
        return [file for file in both if _HEX.match(file.name)]


def pieces_of(blobs: Iterable[Blob]) -> tuple[Piece, ...]:
    """A registry's parts as they are kept."""
    return tuple(Piece(blob.digest, blob.size) for blob in blobs)


def _copy_range(source: Path, target: Path, offset: int, size: int) -> str:
    """Copy a part of a file; the digest of what was copied."""
    seen = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        reader.seek(offset)
        while size and (piece := reader.read(min(size, MIB))):
            seen.update(piece)
            writer.write(piece)
            size -= len(piece)
    return f"sha256:{seen.hexdigest()}"


def _hash(path: Path, check: Callable[[], object] = lambda: None) -> str:
    """The digest of a file."""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            check()
            seen.update(piece)
    return f"sha256:{seen.hexdigest()}"


def _used_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
