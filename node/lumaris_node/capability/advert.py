"""The node's advert: built from what is free now, published on change, refreshed in time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio
from msgspec import structs

from lumaris_node.store import Store
from lumaris_overlay.ports import Overlay
from lumaris_protocol import codec
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import ADVERT_LIFETIME_S_MAX, ADVERT_REFRESH_S
from lumaris_protocol.messages.advert import Advert, PriceTable, Resources, Runtime

log = logging.getLogger(__name__)

# A change after a quiet time goes out at once, closer ones together: gossip has a budget.
_SPACING_S = 0.3
_CHANGE_PERCENT = 20


@dataclass
class Offer:
    """The slow-moving half of an advert."""

    region: str
    total: Resources
    prices: PriceTable
    lease_s_max: int
    benchmarks: dict[str, int]
    runtimes: tuple[Runtime, ...] = ()
    cached: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""


class AdvertPublisher:
    """Keeps the network's picture of this node true."""

    def __init__(
        self,
        overlay: Overlay,
        store: Store,
        key: KeyPair,
        offer: Offer,
        *,
        network: str,
        free: Callable[[], Resources],
        clock: Callable[[], float],
    ) -> None:
        self.offer = offer
        self._overlay, self._store, self._key = overlay, store, key
        self._network, self._free, self._clock = network, free, clock
        self._current: Signed[Advert] | None = None
        # A code that says why nothing is offered for now; "" while there is an offer.
        self.withdrawn_for = ""
        self._dirty = trio.Event()

    def current(self) -> Signed[Advert]:
        """The advert that stands.

        Raises LumarisError `not_accepting` before the first, and why the offer is withdrawn.
        """
        if self.withdrawn_for:
            raise LumarisError(self.withdrawn_for)
        if self._current is None:
            raise LumarisError("not_accepting")
        return self._current

    def changed(self, *, always: bool = False) -> None:
        """Free capacity changed; small changes wait for the next refresh."""
        if always or self._current is None or _differs(self._current.message.free, self._free()):
            self._dirty.set()

    async def run(self) -> None:
        """Publish at once, on change, and before the advert grows old."""
        while True:
            self._dirty = trio.Event()
            try:
                await self.publish()
            except LumarisError as error:
                log.warning("advert not published code=%s", error.code)
            published_at = trio.current_time()
            with trio.move_on_after(ADVERT_REFRESH_S):
                await self._dirty.wait()
            await trio.sleep_until(published_at + _SPACING_S)

    async def publish(self, *, withdrawn: bool = False) -> None:
        """Sign and gossip the advert as things stand."""
        withdrawn = withdrawn or bool(self.withdrawn_for)
        now = self._clock()
        offer = self.offer
        advert = Advert(
            seller=self._key.peer_id,
            seq=await self._store.next_advert_seq(now=now),
            issued_at=int(now),
            expires_at=int(now) + ADVERT_LIFETIME_S_MAX,
            region=offer.region,
            total=offer.total,
            free=self._free(),
            runtimes=offer.runtimes,
            benchmarks=offer.benchmarks,
            prices=offer.prices,
            lease_s_max=offer.lease_s_max,
            cached=offer.cached,
            addresses=offer.addresses,
            certificate=offer.certificate,
            withdrawn=withdrawn,
        )
        signed = self._sign(advert)
        if not withdrawn:
            self._current = signed
        await self._overlay.publish_advert(signed.data)

    def _sign(self, advert: Advert) -> Signed[Advert]:
        """With as many of its images, and then addresses, as there is room for; the first stay."""
        while True:
            try:
                return codec.sign(advert, self._key, self._network)
            except ValueError:
                if advert.cached:
                    advert = structs.replace(advert, cached=advert.cached[:-1])
                elif advert.addresses:
                    advert = structs.replace(advert, addresses=advert.addresses[:-1])
                else:
                    raise


def _differs(old: Resources, new: Resources) -> bool:
    """Whether any resource moved by a fifth, or to or from nothing."""
    pairs = (
        (old.cpu_millis, new.cpu_millis),
        (old.memory_bytes, new.memory_bytes),
        (old.disk_bytes, new.disk_bytes),
        (sum(gpu.count for gpu in old.gpus), sum(gpu.count for gpu in new.gpus)),
    )
    return any(
        before != after
        and (not before or not after or abs(after - before) * 100 >= _CHANGE_PERCENT * before)
        for before, after in pairs
    )
