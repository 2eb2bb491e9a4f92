"""The root folders of images, unpacked once and shared read-only by the sandboxes of this node."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lumaris_node.images.unpack import Unpacker
from lumaris_overlay.image_archive import (
    Allowance,
    ImageArchive,
    ImageConfig,
    check_here,
    parse_config,
)
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN

__all__ = ["ImageConfig", "RootfsStore"]

_ROOT, _CONFIG, _BYTES = "root", "config.json", "bytes"
_DRAFT = ".draft-"
# Free space that an unpacking leaves to the rest of the machine.
_SPARE_BYTES = 256 * 1024 * 1024


class RootfsStore:
    """Root folders by image digest, within `bytes_max` by least use. Its methods block.

    One program at a time uses a directory. Files belong to this user and are readable by all, so
    that a sandbox's own user sees them; nothing in them is setuid or a device. A path in a root
    folder must be opened without following links, which lead where the image says.
    """

    def __init__(self, directory: Path, *, bytes_max: int) -> None:
        self.directory, self._bytes_max = directory, bytes_max
        self._lock = threading.RLock()
        self._pins: Counter[str] = Counter()
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        directory.chmod(0o711)  # a sandbox's user passes through, and lists nothing
        for left in directory.glob(f"{_DRAFT}*"):
            shutil.rmtree(left, ignore_errors=True)

    def add(self, archive: Path, image: str, *, check: Callable[[], object] = lambda: None) -> None:
        """Unpack an image from its archive, checking every layer's hash.

        `check` is called often and raises to stop the work. Raises LumarisError `bad_image`,
        `unsafe_archive`, `disk_short`.
        """
        target = self._folder(image)
        if self.has(image):
            return
        found = ImageArchive(archive)
        if found.digest != image:
            raise LumarisError("bad_image", "The archive holds another image.")
        check_here(found.config)
        free = shutil.disk_usage(self.directory).free - _SPARE_BYTES
        if sum(layer.size for layer in found.layers) > min(free, self._bytes_max):
            raise LumarisError("disk_short", "There is no room to unpack the image.")
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.directory))
        try:
            unpacker = self._unpack(found, draft / _ROOT, min(free, self._bytes_max), check)
            (draft / _CONFIG).write_bytes(found.raw_config)
            (draft / _BYTES).write_text(str(unpacker.bytes))
            draft.chmod(0o755)
            with self._lock:
                if not target.exists():
                    draft.replace(target)
                self._make_room(keep=image)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def has(self, image: str) -> bool:
        """Whether the image is here; another word than a digest is not."""
        return bool(re.fullmatch(DIGEST_PATTERN, image)) and self._folder(image).is_dir()

    def path(self, image: str) -> Path:
        """The image's root folder, for reading only. Raises LumarisError `bad_image`."""
        folder = self._held(image)
        with contextlib.suppress(OSError):
            os.utime(folder)
        return folder / _ROOT

    def config(self, image: str) -> ImageConfig:
        """What the image says of its commands. Raises LumarisError `bad_image`."""
        return parse_config((self._held(image) / _CONFIG).read_bytes())

    def digests(self) -> tuple[str, ...]:
        """Images held, the one used last first."""
        folders = sorted(self._folders(), key=_used_at, reverse=True)
        return tuple(f"sha256:{folder.name}" for folder in folders)

    def remove(self, image: str) -> None:
        """Forget an image. Raises LumarisError `busy` while it is pinned; one not here is fine."""
        with self._lock:
            if self._pins[image]:
                raise LumarisError("busy", "A job uses this image.")
            if self.has(image):
                self._discard(self._folder(image))

    @contextlib.contextmanager
    def pin(self, image: str) -> Iterator[Path]:
        """The image's root folder, kept while the context lasts. Raises `bad_image`."""
        with self._lock:
            root = self.path(image)
            self._pins[image] += 1
        try:
            yield root
        finally:
            with self._lock:
                self._pins[image] -= 1
                if not self._pins[image]:
                    del self._pins[image]

    def _unpack(
        self, archive: ImageArchive, root: Path, bytes_max: int, check: Callable[[], object]
    ) -> Unpacker:
        root.mkdir(mode=0o755)
        root.chmod(0o755)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            unpacker, allowance = Unpacker(descriptor, bytes_max=bytes_max), Allowance(check=check)
            for layer in archive.layers:
                with archive.open_layer(layer, allowance) as reader:
                    unpacker.add_layer(reader)
        finally:
            os.close(descriptor)
        return unpacker

    def _make_room(self, keep: str) -> None:
        """Drop the images used longest ago, but for those in use, until the rest fits."""
        folders = sorted(self._folders(), key=_used_at)
        sizes = {folder: int((folder / _BYTES).read_text()) for folder in folders}
        total = sum(sizes.values())
        for folder in folders:
            image = f"sha256:{folder.name}"
            if total <= self._bytes_max:
                return
            if image != keep and not self._pins[image]:
                total -= sizes[folder]
                self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """Remove an image; at once for others, even if the program dies meanwhile."""
        gone = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.directory))
        folder.replace(gone / folder.name)
        shutil.rmtree(gone, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return [item for item in self.directory.iterdir() if not item.name.startswith(_DRAFT)]

    def _folder(self, image: str) -> Path:
        if not re.fullmatch(DIGEST_PATTERN, image):
            raise LumarisError("bad_image", "An image is named by sha256:<64 hex digits>.")
        return self.directory / image.removeprefix("sha256:")

    def _held(self, image: str) -> Path:
        folder = self._folder(image)
        if not folder.is_dir():
            raise LumarisError("bad_image", f"The image {image[:80]} is not here.")
        return folder


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()
