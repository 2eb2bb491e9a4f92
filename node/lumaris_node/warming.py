"""Compiles what buyers will most likely ask for, before the first one waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from lumaris_node.tiers import Tiers
from lumaris_protocol.catalog import CATALOG, CatalogEntry
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

# No session for this long, and nobody waits for the processors.
_QUIET_S = 3600.0


async def warm_catalog(tiers: Tiers, busy: Callable[[], object]) -> None:
    """Compile the catalog's modules. `busy` says whether sessions run.

    A module with a library beside it takes a minute and gigabytes, so it waits for quiet.
    """
    for entry in CATALOG.values():
        if entry.eager:
            await _compile(tiers, entry)
    for entry in CATALOG.values():
        if not entry.eager:
            await trio.sleep(_QUIET_S)
            while busy():  # noqa: ASYNC110 - as long as there is work
                await trio.sleep(_QUIET_S)
            await _compile(tiers, entry)


async def _compile(tiers: Tiers, entry: CatalogEntry) -> None:
    wasm = tiers.wasm
    if entry.tier != "wasm" or wasm is None or not await wasm.has_image(entry.digest):
        return
    try:
        await wasm.compile(entry.digest)
    except (LumarisError, OSError) as error:
        log.warning("not compiled image=%s error=%r", entry.name, error)
