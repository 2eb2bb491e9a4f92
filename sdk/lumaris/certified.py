"""A long-lived client's standing, kept good: renewed in time, and replaced when its issuer's key is
taken back."""

from __future__ import annotations

import logging
from pathlib import Path

from lumaris import membership
from lumaris.coordinator import CoordinatorLink
from lumaris.membership import Standing
from lumaris_overlay.ports import Overlay
from lumaris_protocol import coordinator_api
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair

log = logging.getLogger(__name__)


class Certified:
    """One client's standing and its coordinator's keys, which follow what anybody says of them."""

    def __init__(
        self,
        link: CoordinatorLink,
        key: KeyPair,
        cache: Path,
        overlay: Overlay,
        standing: Standing,
    ) -> None:
        self._link, self._key, self._cache, self._overlay = link, key, cache, overlay
        self.standing = standing
        self.trusted = standing.trusted()

    async def keep(self) -> None:
        """Get and show the next certificate whenever it is time, until cancelled."""
        while True:
            found = await membership.renew(
                self._link, self._key, self._cache, lambda: self.standing, self.trusted
            )
            try:
                await self._take(found)
            except LumarisError as error:
                log.warning("certificate not shown code=%s", error.code)

    async def replace(self) -> bool:
        """Sellers refuse our certificate: whether its issuer's key counts no more, and there is
        another certificate now. Raises LumarisError."""
        await membership.learn_keys(self._link, self.trusted)
        if self.trusted.signed(self.standing.certificate):
            return False
        await self._take(await membership.rejoin(self._link, self._key, self._cache, self.standing))
        return True

    async def key_list(self) -> bytes:
        """The coordinator's key list. Raises LumarisError."""
        return await self._link.call(coordinator_api.key_list())

    async def _take(self, standing: Standing) -> None:
        self.standing = standing
        if standing.key_list:
            self.trusted.learn(standing.key_list)
        await membership.show(self._overlay, standing)
