"""What the coordinator does on the overlay, in trio: show itself, speak, and listen to adverts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from lumaris_coordinator.bounds import CERTIFICATE_LIFETIME_S
from lumaris_overlay.ports import AdvertEvent, Overlay
from lumaris_protocol import codec, envelope
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import NOTICES_KEPT_MAX, REGIONS_MAX
from lumaris_protocol.messages.advert import Gpu, MembershipCertificate, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.shard_map import Shard, ShardMap

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

# Often, since with a revoked key of ours in its certificate nobody listens to this peer.
_CERTIFY_CHECK_S: Final = 5.0
# The overlay forgets what nobody sought for five minutes.
_SEEK_S: Final = 120.0
_ANY_GPU: Final = (Gpu(model="", vram_bytes=0, count=1),)


class Guest:
    """The coordinator's conduct on one overlay; `attend` lasts as long as that overlay is there.

    `heard` gets each change of the directory, `shards` gives the signed shard map.
    """

    def __init__(
        self,
        context: Context,
        key: KeyPair,
        *,
        shards: Callable[[], bytes],
        heard: Callable[[AdvertEvent], None],
    ) -> None:
        self._context, self._key, self._shards, self._heard = context, key, shards, heard
        self._notices: deque[bytes] = deque(maxlen=NOTICES_KEPT_MAX)
        self._fresh = trio.Event()

    def say(self, notice: bytes) -> None:
        """Have a notice gossiped, now or once there is an overlay. In the overlay's thread only."""
        self._notices.append(notice)
        self._fresh.set()

    async def attend(self, overlay: Overlay) -> None:
        """Be a peer until cancelled. Raises LumarisError when the overlay does not take us in."""
        certificate = self._certificate()
        await overlay.present(certificate.data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_certified, overlay, certificate)
            nursery.start_soon(self._speak, overlay)
            nursery.start_soon(self._keep_sought, overlay)
            async with overlay.adverts() as events:
                async for event in events:
                    self._heard(event)

    def _certificate(self) -> codec.Signed[MembershipCertificate]:
        """Our own word on our own overlay key: a member that sells nothing."""
        context, now = self._context, self._context.now()
        message = MembershipCertificate(
            peer=self._key.peer_id,
            account=derive_id("account", f"{context.peer}{self._key.peer_id}".encode()),
            roles=("buyer",),
            bond_band=0,
            serial=0,  # of no registration
            issued_at=now,
            expires_at=now + CERTIFICATE_LIFETIME_S,
        )
        return codec.sign(message, context.key, context.settings.network)

    async def _keep_certified(
        self, overlay: Overlay, held: codec.Signed[MembershipCertificate]
    ) -> None:
        while True:
            await trio.sleep(_CERTIFY_CHECK_S)
            try:
                age_s = self._context.now() - held.message.issued_at
                renewed = 0 <= age_s < CERTIFICATE_LIFETIME_S / 2
                if renewed and held.signer == self._context.peer:
                    continue
                # First, for it may name the key that signs the next certificate.
                await overlay.publish_notice(self._context.keys.list.data)
                fresh = self._certificate()
                await overlay.present(fresh.data)
                held = fresh
            except LumarisError as error:
                log.warning("overlay certificate not renewed code=%s", error.code)

    async def _speak(self, overlay: Overlay) -> None:
        """Publish each notice; what was said before is said again to a new overlay process."""
        said: set[bytes] = set()
        while True:
            waiting = tuple(self._notices)
            said.intersection_update(waiting)
            for notice in waiting:
                if notice not in said:
                    said.add(notice)
                    await _try(overlay.publish_notice(notice), "notice not gossiped")
            self._fresh = trio.Event()
            if tuple(self._notices) == waiting:
                await self._fresh.wait()

    async def _keep_sought(self, overlay: Overlay) -> None:
        """Hear the sellers of every shard, where the market is divided."""
        while True:
            data = self._shards()
            await _try(overlay.present_shards(data), "shard map not taken")
            shards = codec.decode_payload(envelope.decode(data).payload, ShardMap).shards
            for shard in shards if len(shards) > 1 else ():
                for needs in _sought_in(shard, self._context.settings.currency):
                    await _try(overlay.seek(needs), "shard not sought")
            await trio.sleep(_SEEK_S)


def _sought_in(shard: Shard, currency: str) -> Sequence[Requirements]:
    """Requirements that every seller of a shard may fit."""
    gpus = _ANY_GPU if shard.classes == ("gpu",) else ()
    return [
        Requirements(
            resources=Resources(gpus=gpus),
            tier="wasm",
            regions=shard.regions[start : start + REGIONS_MAX],
            currency=currency,
        )
        for start in range(0, max(1, len(shard.regions)), REGIONS_MAX)
    ]


async def _try(call: Awaitable[None], otherwise: str) -> None:
    try:
        await call
    except LumarisError as error:
        log.warning("%s code=%s", otherwise, error.code)
