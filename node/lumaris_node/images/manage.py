"""The owner's images: what `lumaris node image` does to a node's folder, whether it runs or not."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Final

from lumaris_node.images.archive import make_image
from lumaris_node.images.content import (
    CONTENT_BYTES_DEFAULT,
    IMPORT_PREFIX,
    ContentStore,
    ImageRecord,
)
from lumaris_overlay.image_archive import holds_image
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN

FOLDER: Final = "images"
# Fewer are more likely a slip than a name.
_DIGITS_MIN: Final = 6


def open_store(state: Path, *, bytes_max: int = CONTENT_BYTES_DEFAULT) -> ContentStore:
    """The parts of images in a node's folder. Raises LumarisError `not_writable`."""
    make_private_folder(state)
    try:
        return ContentStore(state / FOLDER, bytes_max=bytes_max)
    except OSError as error:
        raise LumarisError("not_writable", f"{state / FOLDER}: {error.strerror}") from None


def list_images(state: Path) -> list[dict[str, Any]]:
    """The images kept, the one used last first. Raises LumarisError `not_found`."""
    check_folder(state)
    return [_plain(record) for record in open_store(state).records()]


def check_folder(state: Path) -> None:
    """Raises LumarisError `not_found` when no node was ever here: looking makes no folder."""
    if not state.is_dir():
        raise LumarisError(
            "not_found", f"There is no node in {state}.", hint="`lumaris node up` makes one."
        )


def import_image(state: Path, file: Path, *, share: bool = False) -> dict[str, Any]:
    """Keep an image from a file: an image's archive, or the tar of a root folder. Blocks.

    A running node has it from the next order on. Raises LumarisError `bad_image`,
    `unsafe_archive`, `disk_short`, `not_writable`.
    """
    store = open_store(state)
    try:
        if holds_image(file):
            return _plain(store.take_archive(file, share=share))
        with tempfile.TemporaryDirectory(dir=store.directory, prefix=IMPORT_PREFIX) as folder:
            archive = Path(folder) / "image.tar"
            make_image(file, archive)
            return _plain(store.take_archive(archive, share=share))
    except OSError as error:
        raise LumarisError("bad_image", f"{file}: {error.strerror or error}") from None


def remove_image(state: Path, image: str) -> dict[str, Any]:
    """Forget an image; its digest may be cut short.

    Raises LumarisError `not_found`, or `usage` for the beginning of several.
    """
    check_folder(state)
    store = open_store(state)
    word = image.removeprefix("sha256:")
    found = [
        record.image
        for record in store.records()
        if record.image.removeprefix("sha256:").startswith(word)
    ]
    if re.fullmatch(DIGEST_PATTERN, image):
        found = [image] if store.remove(image) else []
    elif len(word) < _DIGITS_MIN:
        raise LumarisError("usage", f"Write at least {_DIGITS_MIN} digits of the digest.")
    elif len(found) > 1:
        raise LumarisError("usage", f"{len(found)} images begin with {image[:80]!r}: write more.")
    elif found:
        store.remove(found[0])
    if not found:
        raise LumarisError("not_found", f"No image {image[:80]!r} is kept here.")
    return {"removed": found[0]}


def _plain(record: ImageRecord) -> dict[str, Any]:
    return {
        "image": record.image,
        "size_bytes": record.size,
        "layers": len(record.layers),
        "source": record.source,
        "share": record.share,
        "imported": record.keep,
    }
