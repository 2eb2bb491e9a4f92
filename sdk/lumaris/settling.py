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
from lumaris_protocol import agreements, codec, coordinator_api, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.ids import derive_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.budget import GrantRequest
from lumaris_protocol.messages.payment import Settle
from lumaris_protocol.messages.receipt import Receipt
from lumaris_protocol.protocols import SESSION

log = logging.getLogger(__name__)

_NUDGE_S = 3


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

    async def grant(self, by_buyer: bytes, by_seller: bytes) -> bytes:
        """Have the coordinator hold an agreement's cap. Raises LumarisError."""
        request = GrantRequest(
            buyer=self._key.peer_id,
            coordinator=self._terms.coordinator,
            agreement_by_buyer=by_buyer,
            agreement_by_seller=by_seller,
            issued_at=int(time.time()),
        )
        signed = codec.sign(request, self._key, self._terms.network)
        return await self._link.call(coordinator_api.grant(signed.data))

    async def settle_all(self, *, skip: frozenset[str] = frozenset()) -> None:
        """One round over every session that is not settled; failures wait for the next round."""
        for item in await self._store.unsettled():
            if item.session in skip:
                continue
            try:
                await self._settle(item)
            except LumarisError as error:
                log.info("not settled session=%s code=%s", item.session, error.code)
                if error.code == "coordinator_unreachable":
                    return

    async def _settle(self, item: Unsettled) -> None:
        if item.grant is None:
            # Cut off between agreement and grant: nothing was held, or only the answer was lost.
            await self._recover_grant(item)
            return
        if item.state == "open":
            await self._nudge(item)  # cut off in mid-session: the seller can release at once
        try:
            answer = await self._link.call(coordinator_api.settle(self._claim(item)))
        except LumarisError as error:
            if error.code != "already_settled":
                raise
            answer = await self._fetch_receipt(item)
        if isinstance(answer, coordinator_api.Claimed):
            await self._store.set_state(item.session, "claimed", "window_open")
            return
        await self._keep(item, answer)

    async def _keep(self, item: Unsettled, answer: bytes) -> None:
        bundle = receipts.decode_bundle(answer)
        receipt = codec.open_signed(
            bundle.receipt, Receipt, network=self._terms.network, signer=self._terms.coordinator
        )
        await self._store.keep_receipt(item.session, receipt.message.receipt, answer)

    async def _fetch_receipt(self, item: Unsettled) -> bytes:
        token = self._terms.token()
        name = derive_id("receipt", agreements.payload_hash(item.by_buyer).encode())
        return await self._link.call(coordinator_api.receipt(name, token))

    async def _recover_grant(self, item: Unsettled) -> None:
        contract = agreements.join(item.by_buyer, item.by_seller, network=self._terms.network)
        # Past start_by, and what clocks may differ by, the coordinator gives no new grant: it only
        # repeats one it has given.
        if contract.agreement.start_by + 2 * CLOCK_SKEW_S >= time.time():
            return
        try:
            grant = await self.grant(item.by_buyer, item.by_seller)
        except LumarisError as error:
            if error.code == "coordinator_unreachable":
                raise
            await self._store.set_state(item.session, "settled", error.code)
            return
        await self._store.keep_grant(item.session, grant, b"")

    async def _nudge(self, item: Unsettled) -> None:
        """Show the seller the grant of a session that never ran: it then settles for nothing."""
        if self._overlay is None or not item.opening:
            return
        with trio.move_on_after(_NUDGE_S):
            try:
                stream = FramedStream(await self._overlay.open_stream(item.seller, SESSION))
                try:
                    await stream.send(Kind.ENVELOPE, item.opening)
                    await stream.receive()
                finally:
                    await stream.aclose()
            except (LumarisError, trio.BrokenResourceError, trio.ClosedResourceError):
                log.info("seller not reached session=%s", item.session)

    def _claim(self, item: Unsettled) -> bytes:
        assert item.grant is not None, "only a session with a grant is claimed"
        settle = Settle(
            session=item.session,
            party=self._key.peer_id,
            coordinator=self._terms.coordinator,
            total_nanos=item.total_nanos,
            agreement_by_buyer=item.by_buyer,
            agreement_by_seller=item.by_seller,
            grant=item.grant,
            voucher=item.voucher,
            closes=item.closes,
            issued_at=int(time.time()),
        )
        return codec.sign(settle, self._key, self._terms.network).data
