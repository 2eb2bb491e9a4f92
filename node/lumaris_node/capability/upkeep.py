"""What is offered follows what is here: tiers, images and addresses are watched, speed measured."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import trio

from lumaris_node.capability import benchmark
from lumaris_node.capability.advert import AdvertPublisher
from lumaris_node.images.service import ImageService
from lumaris_node.tiers import Tiers
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

_IMAGES_S = 30.0
_REACH_S = 2.0


class OfferUpkeep:
    """Changes the offer of `adverts` when this machine changes."""

    def __init__(
        self,
        adverts: AdvertPublisher,
        *,
        overlay: Overlay,
        tiers: Tiers,
        images: ImageService,
        speeds: Path,
    ) -> None:
        """`speeds` is the folder that keeps what was measured of this machine."""
        self._adverts, self._overlay = adverts, overlay
        self._tiers, self._images, self._speeds = tiers, images, speeds

    async def run(self) -> None:
        """Watch, for as long as the node sells."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_tiers)
            nursery.start_soon(self._watch_images)
            nursery.start_soon(self._watch_reach)

    async def look_around(self) -> tuple[str, ...]:
        """Where we can be reached now; buyers are told of a change at once.

        Raises LumarisError when the overlay does not know.
        """
        offer = self._adverts.offer
        found = (await self._overlay.reachability()).addresses
        if found != offer.addresses:
            offer.addresses = found
            self._adverts.changed(always=True)
        return found

    async def _watch_reach(self) -> None:
        """A relay's address, or a new one of ours, is worth nothing until buyers know it."""
        while True:
            await trio.sleep(_REACH_S)
            try:
                await self.look_around()
            except LumarisError as error:
                log.debug("reach not known code=%s", error.code)

    async def _watch_tiers(self) -> None:
        """A tier whose engine went away leaves the advert, and comes back with it."""
        await self._tiers.watch(self._tiers_changed)

    def _tiers_changed(self) -> None:
        self._adverts.offer.runtimes = self._tiers.runtimes
        self._adverts.changed(always=True)

    async def _watch_images(self) -> None:
        """Buyers prefer a seller that holds their image, so they are told what is here."""
        offer = self._adverts.offer
        while True:
            await trio.sleep(_IMAGES_S)
            cached = await self._images.cached(self._tiers.executors.values())
            if cached != offer.cached:
                offer.cached = cached
                self._adverts.changed(always=True)

    async def measure(self) -> None:
        """Say how fast this machine is once it sells: nobody waits for that."""
        offer = self._adverts.offer
        await self._tiers.settled()
        measure = partial(benchmark.benchmarks, self._speeds, offer.total.cpu_millis)
        speeds = await trio.to_thread.run_sync(measure, abandon_on_cancel=True)
        if speeds != offer.benchmarks:
            offer.benchmarks = speeds
            self._adverts.changed(always=True)
