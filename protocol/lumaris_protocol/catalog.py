"""Images a buyer can name without having them: a name for a module pinned by its hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lumaris_protocol.messages.advert import Tier


@dataclass(frozen=True)
class CatalogEntry:
    """A pinned image, and the program names its one module answers to."""

    name: str
    tier: Tier
    digest: str
    extra: str  # the extra of the distribution that installs it on a node
    licence: str
    programs: tuple[str, ...]


CATALOG: Final[dict[str, CatalogEntry]] = {
    "python:3.12-wasi": CatalogEntry(
        name="python:3.12-wasi",
        tier="wasm",
        digest="sha256:e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763",
        extra="python-wasi",
        licence="Apache-2.0 and PSF-2.0",
        programs=("python", "python3", "python3.12"),
    ),
}
