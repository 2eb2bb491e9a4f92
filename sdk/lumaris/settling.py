"""Bringing a buyer's ended sessions to rest: receipts now, claims later, recovery after a crash."""

from __future__ import annotations

import logging
import time

import trio

from lumaris.coordinator import CoordinatorLink
from lumaris.market import BuyerTerms
from lumaris.store import Store, Unsettled
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import Overlay
from lumaris_protocol import agreements, codec, coordinator_api, receipts, settlement
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.ids import derive_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.messages.budget import GrantRequest
from lumaris_protocol.messages.execution import SessionOpen
from lumaris_protocol.messages.receipt import Receipt
from lumaris_protocol.protocols import SESSION
from lumaris_protocol.settlement import Papers

log = logging.getLogger(__name__)

_NUDGE_S = 3
_ASK_S_MIN, _ASK_S_MAX = 0.5, 3600.0


class Settling:
    """The buyer's side of settlement. All of it can be repeated without harm."""

    def __init__(
        self,
        link: CoordinatorLink,
        store: Store,
        key: KeyPair,
        terms: BuyerTerms,
        overlay: Overlay | None,
    ) -> None:
        self._link, self._store, self._key, self._terms = link, store, key, terms
        self._overlay = overlay
        self._one_round = trio.Lock()
        self._asked: dict[str, tuple[float, float]] = {}  # claimed sessions: when next, then pause

    async def grant(self, by_buyer: bytes, by_seller: bytes) -> bytes:
        """Have the coordinator hold an agreement's cap. Raises LumarisError."""
        request = GrantRequest(
            buyer=self._key.peer_id,
            coordinator=agreements.coordinator_of(by_buyer),
            agreement_by_buyer=by_buyer,
            agreement_by_seller=by_seller,
            issued_at=int(time.time()),
        )
        signed = codec.sign(request, self._key, self._terms.network)
        return await self._link.call(coordinator_api.grant(signed.data))

    async def settle_all(self, *, skip: frozenset[str] = frozenset()) -> None:
        """One round over every session that is not settled; failures wait for the next round."""
        async with self._one_round:
            for item in await self._store.unsettled():
                if item.papers.session in skip or not self._is_due(item):
                    continue
                try:
                    await self._settle(item)
                except LumarisError as error:
                    log.info("not settled session=%s code=%s", item.papers.session, error.code)
                    if error.code == "coordinator_unreachable":
                        return

    def _is_due(self, item: Unsettled) -> bool:
        """A claim that waits for its seller is asked about ever more rarely."""
        if item.state != "claimed":
            return True
        now = trio.current_time()
        due, pause_s = self._asked.get(item.papers.session, (now, _ASK_S_MIN))
        if now < due:
            return False
        self._asked[item.papers.session] = (now + pause_s, min(2 * pause_s, _ASK_S_MAX))
        return True

    async def _settle(self, item: Unsettled) -> None:
        if item.papers.grant is None:
            # Cut off between agreement and grant: nothing was held, or only the answer was lost.
            await self._recover_grant(item)
            return
        if item.state == "open" or (item.state == "claimed" and item.papers.voucher is None):
            await self._nudge(item)  # a seller that is shown the grant can release it at once
        try:
            answer = await self._link.call(coordinator_api.settle(self._claim(item)))
        except LumarisError as error:
            if error.code != "already_settled":
                raise
            answer = await self._fetch_receipt(item)
        if isinstance(answer, coordinator_api.Claimed):
            await self._store.set_state(item.papers.session, "claimed", "window_open")
            return
        await self._keep(item, answer)

    async def _keep(self, item: Unsettled, answer: bytes) -> None:
        bundle = receipts.decode_bundle(answer)
        receipt = codec.open_signed(bundle.receipt, Receipt, network=self._terms.network)
        if receipt.signer not in self._terms.coordinators:
            raise LumarisError("wrong_signer", "The receipt is not signed by the coordinator.")
        if self._terms.log is not None:
            self._terms.log.shown(bundle.checkpoint)
        await self._store.keep_receipt(item.papers.session, receipt.message.receipt, answer)

    async def _fetch_receipt(self, item: Unsettled) -> bytes:
        token = self._terms.token()
        name = derive_id("receipt", agreements.payload_hash(item.papers.by_buyer).encode())
        return await self._link.call(coordinator_api.receipt(name, token))

    async def _recover_grant(self, item: Unsettled) -> None:
        contract = agreements.join(
            item.papers.by_buyer, item.papers.by_seller, network=self._terms.network
        )
        # Past start_by, and what clocks may differ by, the coordinator gives no new grant: it only
        # repeats one it has given.
        if contract.agreement.start_by + 2 * CLOCK_SKEW_S >= time.time():
            return
        try:
            grant = await self.grant(item.papers.by_buyer, item.papers.by_seller)
        except LumarisError as error:
            if error.code in coordinator_api.TRANSIENT:
                raise
            await self._store.set_state(item.papers.session, "settled", error.code)
            return
        await self._store.keep_grant(item.papers.session, grant, b"")

    async def _nudge(self, item: Unsettled) -> None:
        """Show the seller the grant of a session that never ran: it then settles for nothing."""
        if self._overlay is None:
            return
        opening = item.opening or self._show_grant(item.papers)
        with trio.move_on_after(_NUDGE_S):
            try:
                stream = FramedStream(await self._overlay.open_stream(item.seller, SESSION))
                try:
                    await stream.send(Kind.ENVELOPE, opening)
                    await stream.receive()
                finally:
                    await stream.aclose()
            except (LumarisError, trio.BrokenResourceError, trio.ClosedResourceError):
                log.info("seller not reached session=%s", item.papers.session)

    def _show_grant(self, papers: Papers) -> bytes:
        """The first word of a session whose own key died with the program that opened it."""
        assert papers.grant is not None, "only a session with a grant is open"
        root = agreements.payload_hash(papers.by_buyer)
        chain = SendChain(self._key, network=self._terms.network, session=papers.session, root=root)
        return chain.sign(SessionOpen, agreement_hash=root, grant=papers.grant).data

    def _claim(self, item: Unsettled) -> bytes:
        return settlement.claim(
            item.papers,
            self._key,
            network=self._terms.network,
            coordinator=agreements.coordinator_of(item.papers.by_buyer),
            now=int(time.time()),
        )
