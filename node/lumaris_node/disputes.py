"""Disputes against this node, answered by itself; unpaid deliveries, disputed if the owner says.

The node asks its coordinator every few minutes, and at once when a settlement was refused for a
dispute. It answers each dispute once, with what it kept of the session: a seller that stays silent
is ruled on by what its buyer shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_node.store import Store
from lumaris_overlay.evidence import read_evidence
from lumaris_protocol import agreements, codec, coordinator_api, dispute_file, pleading
from lumaris_protocol.agreements import Contract
from lumaris_protocol.coordinator_api import Dispute
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.machines.dispute import OPEN
from lumaris_protocol.messages.dispute import DisputeOpen
from lumaris_protocol.rulings import Dossier, work
from lumaris_protocol.settlement import Papers

log = logging.getLogger(__name__)

# Evidence is taken for hours or days, so an answer may wait some minutes.
_LOOK_S: Final = 180.0
_SOON_S: Final = 5.0  # after a hint, and no more often however many there are
# Of the disputes of a whole life a round reads these; the next one goes on.
_PAGES_MAX: Final = 8
# What one refusal says again and again is not asked for each time.
_REFUSED_MAX: Final = 1024


# These say something of the coordinator and nothing of one dispute.
_OUTAGE: Final = ("coordinator_unreachable", "busy", "unauthorized", "rate_limited")


@dataclass(frozen=True)
class _Round:
    """What one look found."""

    open: int
    unanswered: int
    next_deadline: int


class Disputes:
    """The node's side of every dispute it is a party of."""

    def __init__(
        self,
        link: CoordinatorLink,
        store: Store,
        key: KeyPair,
        *,
        network: str,
        token: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._link, self._store, self._key, self._network = link, store, key, network
        self._token, self._clock = token, clock
        self._wake = trio.Event()
        self._looking = trio.Lock()
        self._after = 0  # every dispute up to this number is over
        self._answered: set[str] = set()
        self._refused: dict[str, str] = {}
        self._counts = {"answered": 0, "opened": 0}
        self._last = _Round(0, 0, 0)
        self.last_error = ""

    def wake(self) -> None:
        """Something hints at a dispute: look soon."""
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For the owner: what is open, what this node did, until when it must do more."""
        return {
            "open": self._last.open,
            "unanswered": self._last.unanswered,
            "answer_by": self._last.next_deadline,
            **self._counts,
        }

    async def run(self) -> None:
        """For as long as the node lives."""
        while True:
            self._wake = trio.Event()
            try:
                await self.look()
                self.last_error = ""
            except LumarisError as error:
                self.last_error = error.code
                log.info("disputes not read code=%s", error.code)
            except Exception:
                self.last_error = "internal"
                log.exception("disputes not read")
            await trio.sleep(_SOON_S)
            with trio.move_on_after(_LOOK_S - _SOON_S):
                await self._wake.wait()

    async def look(self) -> None:
        """Read the disputes that may be open, and answer those that wait for us.

        Raises LumarisError when the coordinator does not say.
        """
        async with self._looking:  # two at once would answer one dispute with the same number
            await self._look()

    async def _look(self) -> None:
        found, after, over = list[Dispute](), self._after, True
        for _ in range(_PAGES_MAX):
            page = await self._link.call(coordinator_api.disputes(self._token(), after=after))
            for dispute in page.disputes:
                after = dispute.number
                over = over and dispute.state not in OPEN
                self._after = dispute.number if over else self._after
                if dispute.state in OPEN:
                    found.append(dispute)
            if page.next is None or not page.disputes:
                break
        names = {dispute.dispute for dispute in found}
        self._answered &= names
        self._refused = {name: code for name, code in self._refused.items() if name in names}
        for dispute in found:
            if dispute.opener != self._key.peer_id and dispute.dispute not in self._answered:
                await self._try_answer(dispute)
        waiting = [
            dispute.evidence_until
            for dispute in found
            if dispute.opener != self._key.peer_id and dispute.dispute not in self._answered
        ]
        self._last = _Round(len(found), len(waiting), min(waiting, default=0))

    async def _try_answer(self, dispute: Dispute) -> None:
        """One dispute, on its own: what is wrong with it must not keep the others waiting."""
        name = dispute.dispute
        try:
            shown = await self._answer(dispute)
        except LumarisError as error:
            if error.code in _OUTAGE:
                raise
            if self._refused.get(name) != error.code and len(self._refused) < _REFUSED_MAX:
                self._refused[name] = error.code
                log.warning("dispute not answered dispute=%s code=%s", name, error.code)
            return
        except OSError as error:
            log.warning("evidence not read dispute=%s error=%s", name, error)
            return
        self._answered.add(name)
        if shown is not None:
            self._counts["answered"] += 1
            log.warning(
                "dispute answered dispute=%s claim=%s documents=%d", name, dispute.claim, shown
            )

    async def _answer(self, dispute: Dispute) -> int | None:
        """How many documents were shown; None when all was said before."""
        token, now = self._token(), int(self._clock())
        data = await self._link.call(coordinator_api.dispute_document(dispute.dispute, token))
        file = dispute_file.decode(data)
        before = pleading.shown_by(file, self._key.peer_id)
        if before.closed:
            return None
        contract = self._contract(file.opened)
        if contract.hash != dispute.agreement_hash:
            raise EnvelopeError("wrong_domain", "The dispute file is another dispute's.")
        kept = await self._kept(contract.agreement.session)
        shown = set(before.documents)
        wanted = pleading.choose(kept, order=dispute.order)
        fresh = [document for document in wanted if document not in shown]
        room = pleading.Room().less(before.documents)
        chosen = pleading.choose(fresh, order=dispute.order, room=room)
        if before.bundles and not chosen:
            return None
        for bundle in pleading.bundles(
            dispute.dispute,
            contract.hash,
            self._key,
            chosen,
            n=before.bundles,
            done=dispute.claim != "wrong_result",  # the owner may have to show a second run
            network=self._network,
            now=now,
        ):
            await self._link.call(coordinator_api.add_evidence(dispute.dispute, bundle))
        return len(chosen)

    async def open_unpaid(self, item: Papers) -> bool:
        """Dispute what was delivered in an ended session and not vouchered, if anything was.

        Whether a dispute of it is open now. Raises LumarisError as the coordinator refuses it.
        """
        if item.grant is None or item.closes:
            return False
        contract = agreements.join(item.by_buyer, item.by_seller, network=self._network)
        kept = await self._kept(item.session)
        chosen = pleading.choose(kept, room=pleading.first_bundle_room())
        dossier = Dossier(contract, network=self._network)
        dossier.add(chosen, party=self._key.peer_id)
        owed = pleading.asked(dossier.main, "unpaid_delivery", order=0, paid_nanos=item.total_nanos)
        if work.worth(dossier.main).delivered <= item.total_nanos or not owed:
            return False
        opening = pleading.opening(
            contract,
            item.grant,
            self._key,
            "unpaid_delivery",
            order=0,
            amount_nanos=owed,
            evidence=chosen,
            network=self._network,
            now=int(self._clock()),
        )
        found = await self._link.call(coordinator_api.open_dispute(opening))
        self._counts["opened"] += 1
        log.warning(
            "unpaid delivery disputed dispute=%s session=%s amount_nanos=%d bond_nanos=%d",
            found.dispute,
            item.session,
            owed,
            found.bond_nanos,
        )
        self.wake()
        return True

    def _contract(self, opened: bytes) -> Contract:
        message = codec.open_signed(opened, DisputeOpen, network=self._network).message
        contract = agreements.join(
            message.agreement_by_buyer, message.agreement_by_seller, network=self._network
        )
        if contract.agreement.seller != self._key.peer_id:
            raise EnvelopeError("wrong_signer", "The agreement is not one of ours.")
        return contract

    async def _kept(self, session: str) -> list[bytes]:
        return await trio.to_thread.run_sync(read_evidence, self._store.evidence, session)
