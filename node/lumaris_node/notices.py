"""What the coordinator tells everybody, as far as it concerns a node."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_node.witness import Witness
from lumaris_overlay.notice_upkeep import follow_notices, keep_keys, keep_revocations
from lumaris_overlay.ports import Notice, Overlay
from lumaris_protocol import coordinator_api
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.messages.notice import CheckpointNotice, KeyList
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)


class Notices:
    """Peers that the coordinator no longer vouches for are in `revoked`: buyers among them get no
    quotes, and no session with them goes on."""

    def __init__(self, clock: Callable[[], float], keys: TrustedKeys) -> None:
        self.revoked = RevokedSet()
        self._clock, self._keys = clock, keys

    async def run(
        self,
        overlay: Overlay,
        link: CoordinatorLink,
        witness: Witness,
        on_revoked: Callable[[], None],
    ) -> None:
        """Follow them until cancelled: by gossip, and by asking for what that did not bring.

        `on_revoked` is called when there are more in `revoked`.
        """

        def heard(notice: Notice, fresh: frozenset[str]) -> None:
            if fresh:
                on_revoked()
            try:
                if notice.kind == CheckpointNotice.TYPE:
                    witness.observe_notice(notice.envelope)
                elif notice.kind == KeyList.TYPE:
                    self._keys.learn(notice.envelope)
            except LumarisError as error:
                log.warning("%s not taken code=%s", notice.kind, error.code)

        async def fetch(after: int) -> bytes:
            return await link.call(coordinator_api.revocations(after))

        async def fetch_keys() -> bytes:
            return await link.call(coordinator_api.key_list())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_revocations, overlay, fetch)
            nursery.start_soon(keep_keys, overlay, self._keys, fetch_keys)
            await follow_notices(overlay, self.revoked, clock=self._clock, heard=heard)
