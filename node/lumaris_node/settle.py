"""Settling what ended: each finished session goes to the coordinator until it has answered.

The claim is idempotent, so it is simply repeated, with growing pauses, across restarts and outages.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_node.desk import Terms
from lumaris_node.store import Store
from lumaris_protocol import agreements, codec, coordinator_api, ids, receipts, settlement
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.receipt import Receipt
from lumaris_protocol.settlement import Papers

log = logging.getLogger(__name__)

_RETRY_S_MIN, _RETRY_S_MAX = 0.5, 60.0
_DISPUTED_S = 600.0  # a ruling takes hours or days
# These say something of the coordinator and nothing of the claim: the others would meet them too.
_OUTAGE = ("coordinator_unreachable", "busy", "unauthorized")
# Any other refusal stands whatever is retried; the claim is then closed with it as its reason.
# A claim that is `not_yet_valid` waits for our clock to be put right.
_RETRYABLE = coordinator_api.TRANSIENT | {"not_yet_valid", "in_dispute"}


@dataclass(frozen=True)
class _Again:
    code: str
    due_at: float
    pause_s: float


class Settler:
    """The node's claims."""

    def __init__(
        self,
        link: CoordinatorLink,
        store: Store,
        key: KeyPair,
        terms: Terms,
        *,
        token: Callable[[], str],
        clock: Callable[[], float],
        dispute: Callable[[Papers], Awaitable[bool]] | None = None,
        disputed: Callable[[], None] = lambda: None,
    ) -> None:
        """`dispute` may open one before a session is claimed; `disputed` hears that one is open."""
        self._dispute, self._disputed = dispute, disputed
        self._seen: set[str] = set()  # sessions that `dispute` has looked at
        self._link, self._store, self._key, self._terms = link, store, key, terms
        self._token, self._clock = token, clock
        self._lock = trio.Lock()
        self._again: dict[str, _Again] = {}  # claims that failed by themselves
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
            try:
                clear = await self.settle_all()
            except Exception:
                log.exception("claims not read")
                clear = False
            pause = _RETRY_S_MIN if clear else min(2 * pause, _RETRY_S_MAX)
            with trio.move_on_after(_RETRY_S_MAX if clear else pause):
                await self._wake.wait()

    async def settle_all(self) -> bool:
        """One round over everything unsettled that is due; whether nothing is left.

        A claim that fails by itself is tried again after its own growing pause, past the others.
        """
        async with self._lock:
            items, now = await self._store.unsettled(), trio.current_time()
            names = {item.session for item in items}
            self._again = {name: again for name, again in self._again.items() if name in names}
            self._seen &= names
            for item in items:
                again = self._again.get(item.session)
                if again is not None and again.due_at > now:
                    continue
                code = await self._try(item)
                if code in _OUTAGE:
                    self.last_error = code
                    return False
            self.last_error = next((again.code for again in self._again.values()), "")
            return not self._again

    async def _try(self, item: Papers) -> str:
        """The code that a claim is refused with for now; empty when it is closed."""
        name = item.session
        try:
            await self._settle(item)
            code = ""
        except LumarisError as error:
            code = error.code
            if code not in _RETRYABLE:
                log.warning("claim refused session=%s code=%s", name, code)
                await self._store.give_up(name, code)
                code = ""
        except Exception:
            if name not in self._again:
                log.exception("claim failed session=%s", name)
            code = "internal"
        if not code:
            self._again.pop(name, None)
        elif code not in _OUTAGE:
            before = self._again.get(name)
            if code == "in_dispute" and (before is None or before.code != code):
                log.warning("claim waits for the end of a dispute session=%s", name)
            pause_s = _RETRY_S_MIN if before is None else min(2 * before.pause_s, _RETRY_S_MAX)
            pause_s = _DISPUTED_S if code == "in_dispute" else pause_s
            self._again[name] = _Again(code, trio.current_time() + pause_s, pause_s)
        return code

    async def _dispute_first(self, item: Papers) -> None:
        """A dispute that the coordinator refuses is no reason not to claim."""
        if self._dispute is None or item.session in self._seen:
            return
        try:
            await self._dispute(item)
        except LumarisError as error:
            if error.code in coordinator_api.TRANSIENT:
                raise
            log.warning("not disputed session=%s code=%s", item.session, error.code)
        except OSError as error:
            log.warning("not disputed session=%s error=%s", item.session, error)
        self._seen.add(item.session)

    async def _settle(self, item: Papers) -> None:
        await self._dispute_first(item)
        claim = settlement.claim(
            item,
            self._key,
            network=self._terms.network,
            coordinator=agreements.coordinator_of(item.by_buyer),
            now=int(self._clock()),
        )
        try:
            answer = await self._link.call(coordinator_api.settle(claim))
        except LumarisError as error:
            if error.code != "already_settled":
                raise
            answer = await self._fetch(item, error)
        if isinstance(answer, coordinator_api.Claimed):
            self._disputed()
            raise LumarisError("in_dispute")
        bundle = receipts.decode_bundle(answer)
        signed = codec.open_signed(bundle.receipt, Receipt, network=self._terms.network)
        if signed.signer not in self._terms.coordinators:
            raise LumarisError("internal", "The receipt is not signed by the coordinator.")
        receipt = signed.message
        if receipt.session != item.session or receipt.seller != self._key.peer_id:
            raise LumarisError("internal", "The coordinator sent the receipt of another session.")
        await self._store.settled(item.session, receipt=answer, earned_nanos=receipt.seller_nanos)
        log.info("settled session=%s earned_nanos=%d", item.session, receipt.seller_nanos)

    async def _fetch(self, item: Papers, refusal: LumarisError) -> bytes:
        """The receipt of a session that was settled with another total than we claim."""
        contract = agreements.join(item.by_buyer, item.by_seller, network=self._terms.network)
        name = ids.derive_id("receipt", contract.hash.encode())
        try:
            return await self._link.call(coordinator_api.receipt(name, self._token()))
        except LumarisError as error:
            if error.code == "unauthorized":  # our token, not the claims of others
                raise LumarisError("internal", "The token is not accepted.") from None
            if error.code in _RETRYABLE:
                raise
            raise refusal from None
