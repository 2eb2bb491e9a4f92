"""Settling what ended: each finished session goes to the coordinator until it has answered.

The claim is idempotent, so it is simply repeated, with growing pauses, across restarts and outages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_node.desk import Terms
from lumaris_node.store import Store
from lumaris_protocol import codec, coordinator_api, receipts, settlement
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.receipt import Receipt
from lumaris_protocol.settlement import Papers

log = logging.getLogger(__name__)

_RETRY_S_MIN, _RETRY_S_MAX = 0.5, 60.0
# Any other refusal stands whatever is retried; the claim is then closed with it as its reason.
# A claim that is `not_yet_valid` waits for our clock to be put right.
_RETRYABLE = (
    "coordinator_unreachable",
    "busy",
    "internal",
    "unauthorized",
    "timeout",
    "not_yet_valid",
)


class Settler:
    """The node's claims."""

    def __init__(
        self,
        link: CoordinatorLink,
        store: Store,
        key: KeyPair,
        terms: Terms,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._link, self._store, self._key, self._terms = link, store, key, terms
        self._clock = clock
        self._wake = trio.Event()
        self.last_error = ""

    def wake(self) -> None:
        """Something ended: look at once."""
        self._wake.set()

    async def run(self) -> None:
        """For as long as the node lives."""
        pause = _RETRY_S_MIN
        while True:
            self._wake = trio.Event()
            pause = _RETRY_S_MIN if await self.settle_all() else min(2 * pause, _RETRY_S_MAX)
            with trio.move_on_after(_RETRY_S_MAX if pause == _RETRY_S_MIN else pause):
                await self._wake.wait()

    async def settle_all(self) -> bool:
        """One round over everything unsettled; whether nothing is left."""
        clear = True
        for item in await self._store.unsettled():
            try:
                await self._settle(item)
                self.last_error = ""
            except LumarisError as error:
                self.last_error = error.code
                if error.code in _RETRYABLE:
                    clear = False
                    break
                log.warning("claim refused session=%s code=%s", item.session, error.code)
                await self._store.give_up(item.session, error.code)
        return clear

    async def _settle(self, item: Papers) -> None:
        claim = settlement.claim(
            item,
            self._key,
            network=self._terms.network,
            coordinator=self._terms.coordinator,
            now=int(self._clock()),
        )
        answer = await self._link.call(coordinator_api.settle(claim))
        if isinstance(answer, coordinator_api.Claimed):
            raise LumarisError("internal", "The coordinator let a seller's claim wait.")
        bundle = receipts.decode_bundle(answer)
        receipt = codec.open_signed(
            bundle.receipt, Receipt, network=self._terms.network, signer=self._terms.coordinator
        ).message
        await self._store.settled(item.session, receipt=answer, earned_nanos=receipt.seller_nanos)
        log.info("settled session=%s earned_nanos=%d", item.session, receipt.seller_nanos)
