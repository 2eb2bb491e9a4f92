"""What a buyer may name as an image: a catalog name, a digest, or a local wasm file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lumaris import artifacts
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN
from lumaris_protocol.messages.advert import Tier

_WASM_MAGIC = b"\0asm"


@dataclass(frozen=True)
class Image:
    """A resolved image: its tier, its digest, and the local files a seller may ask for."""

    tier: Tier
    digest: str
    files: Mapping[str, Path] = field(default_factory=dict)


async def resolve(name: str, command: Sequence[str] = ()) -> Image:
    """The image of a name. Raises LumarisError `bad_image`.

    A module runs whatever its command is called, so a mistyped program of a catalog image is
    refused here (`bad_command`), before it costs anything.
    """
    entry = CATALOG.get(name)
    if entry is not None:
        if command and command[0] not in entry.programs:
            known = ", ".join(entry.programs)
            raise LumarisError(
                "bad_command", f"{name} has no program {command[0]!r}, but: {known}."
            )
        return Image(entry.tier, entry.digest)
    if re.match(DIGEST_PATTERN, name):
        return Image("container", name)
    path = Path(name)
    if path.suffix == ".wasm":
        return await trio.to_thread.run_sync(_local_module, path)
    known = ", ".join(sorted(CATALOG))
    raise LumarisError("bad_image", f"{name!r} is no image. Catalog: {known}.")


def _local_module(path: Path) -> Image:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_WASM_MAGIC))
    except OSError as error:
        raise LumarisError("bad_image", f"{path}: {error.strerror}") from None
    if magic != _WASM_MAGIC:
        raise LumarisError("bad_image", f"{path} is not a WebAssembly module.")
    _, digest = artifacts.hash_file(path)
    return Image("wasm", digest, {digest: path})
