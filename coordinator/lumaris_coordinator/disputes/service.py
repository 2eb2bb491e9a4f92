"""What parties do to a dispute, and what time does to it.

Each signed document is its own idempotency key: the same bytes change nothing and find the dispute
as it is. The outer signature is checked before the store is touched; the evidence inside, and
everything that follows from it, in one operation of the writer.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lumaris_coordinator.bounds import DISPUTES_PER_ROUND_MAX
from lumaris_coordinator.disputes import checkers, ending, store
from lumaris_coordinator.disputes.cases import Papers, case_of, papers_of
from lumaris_coordinator.disputes.opening import Opening, open_dispute
from lumaris_coordinator.disputes.store import Bundle, Dispute
from lumaris_coordinator.escrow.disputed import current
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import agreements, codec, dispute_file, envelope, rulings
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.limits import CLOCK_SKEW_S, DISPUTE_DOCUMENT_BYTES_MAX, EVIDENCE_BUNDLES_MAX
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.dispute import (
    DisputeEvidence,
    DisputeOpen,
    DisputeSplit,
    DisputeWithdraw,
)

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


class Disputes:
    """The rules of disputing."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def open(self, body: bytes) -> Dispute:
        """Open a dispute for a signed DisputeOpen; a proven contradiction is ruled on at once.

        Raises EnvelopeError or RefusedError for documents that do not hold, and LumarisError:
        `not_found`, `not_disputable`, `evidence_insufficient`, `dispute_open`, `no_funds`,
        `too_many_holds`, `over_cap`, `busy`.
        """
        context, now = self._context, self._context.now()
        signed = self._open(body, DisputeOpen)
        message = signed.message
        if signed.signer != message.opener:
            raise EnvelopeError("wrong_signer", "An opening is signed by its opener.")
        self._check_date(message.issued_at, now)
        network = context.settings.network
        contract = agreements.join(
            message.agreement_by_buyer, message.agreement_by_seller, network=network
        )
        context.keys.signer(contract.agreement.coordinator)
        rulings.check_opening(message, contract)
        agreements.open_grant(
            message.grant,
            contract,
            network=network,
            coordinator=contract.agreement.coordinator,
            now=None,
        )
        opening = Opening(signed, contract)
        return await context.store.submit(lambda connection: self._opened(connection, opening, now))

    def _opened(self, connection: Connection, opening: Opening, now: int) -> Dispute:
        held = store.find(connection, opening.signed.message.dispute)
        if held is not None:
            if store.bundles(connection, held.id)[0].envelope == opening.signed.data:
                return held
            raise LumarisError("dispute_open", "This claim was made before, in other words.")
        dispute = open_dispute(self._context, connection, opening, now=now)
        papers = papers_of(self._context, connection, dispute)
        return self._go_on(connection, dispute, papers, now)

    async def add_evidence(self, dispute: str, body: bytes) -> Dispute:
        """Keep a party's signed DisputeEvidence; the dispute after it, which it may have ended.

        Raises EnvelopeError or RefusedError for evidence that is not admitted, and LumarisError:
        `not_found`, `dispute_closed`, `out_of_sequence`, `busy`.
        """
        now = self._context.now()
        signed = self._open(body, DisputeEvidence)
        self._check_date(signed.message.issued_at, now)
        if signed.message.dispute != dispute:
            raise EnvelopeError("wrong_domain", "The evidence names another dispute.")
        return await self._context.store.submit(
            lambda connection: self._add(connection, signed, now)
        )

    def _add(self, connection: Connection, signed: Signed[DisputeEvidence], now: int) -> Dispute:
        dispute = _of_party(connection, signed.message.dispute, signed.signer)
        bundles = store.bundles(connection, dispute.id)
        if any(bundle.envelope == signed.data for bundle in bundles):
            return dispute
        if dispute.open and now > dispute.deadline:
            raise LumarisError("dispute_closed", "The time for evidence is over.")
        own = [bundle for bundle in bundles[1:] if bundle.party == signed.signer]
        if len(own) >= EVIDENCE_BUNDLES_MAX or any(bundle.done for bundle in own):
            raise LumarisError("dispute_closed", "This party has no more to show.")
        if signed.message.n != len(own):  # before the costly part: opening all that was shown
            raise LumarisError("out_of_sequence", f"The next bundle has the number {len(own)}.")
        papers = papers_of(self._context, connection, dispute)
        dispute_file.check_bundle(signed, papers.opened, papers.contract, n=len(own))
        papers.dossier.add(signed.message.evidence, party=signed.signer)
        after = store.advance(connection, dispute, "evidence", evidence=signed.hash, now=now)
        bundle = Bundle(len(bundles), signed.signer, signed.message.done, signed.data)
        store.add_bundle(connection, dispute.id, bundle, now=now)
        emit(
            connection,
            "dispute.evidence",
            ref=dispute.id,
            parties=(dispute.buyer, dispute.seller),
            body={"by": signed.signer, "n": len(own), "done": signed.message.done},
            now=now,
        )
        papers = Papers(papers.opened, papers.contract, papers.dossier, (*papers.bundles, bundle))
        return self._go_on(connection, after, papers, now)

    async def withdraw(self, dispute: str, body: bytes) -> Dispute:
        """The opener takes its claim back. Raises EnvelopeError, or LumarisError `not_found`,
        `forbidden`, `dispute_closed`, `busy`."""
        now = self._context.now()
        signed = self._open(body, DisputeWithdraw)
        message = signed.message
        if message.dispute != dispute or message.party != signed.signer:
            raise EnvelopeError("wrong_domain", "The withdrawal is not for this dispute.")

        def operation(connection: Connection) -> Dispute:
            found = _of_party(connection, dispute, signed.signer)
            if found.withdrawal == signed.data:
                return found
            if signed.signer != found.opener:
                raise LumarisError("forbidden", "Only its opener can withdraw a dispute.")
            if message.agreement_hash != found.agreement_hash:
                raise LumarisError("wrong_domain", "The withdrawal names another agreement.")
            papers = papers_of(self._context, connection, found)
            return ending.withdraw(self._context, connection, found, papers, body, now=now)

        return await self._context.store.submit(operation)

    async def split(self, dispute: str, body: bytes) -> Dispute:
        """Keep one side's signed DisputeSplit; with the other side's equal one the dispute ends.

        Raises EnvelopeError, or LumarisError `not_found`, `dispute_closed`, `over_cap`, `busy`.
        """
        now = self._context.now()
        signed = self._open(body, DisputeSplit)
        if signed.message.dispute != dispute:
            raise EnvelopeError("wrong_domain", "The split is not for this dispute.")
        return await self._context.store.submit(
            lambda connection: self._split(connection, signed, now)
        )

    def _split(self, connection: Connection, signed: Signed[DisputeSplit], now: int) -> Dispute:
        found = _of_party(connection, signed.message.dispute, signed.signer)
        if signed.data in (found.split_by_buyer, found.split_by_seller):
            return found
        if not found.open:
            raise LumarisError("dispute_closed")
        if signed.message.agreement_hash != found.agreement_hash:
            raise LumarisError("wrong_domain", "The split names another agreement.")
        after = store.save_split(connection, found, signed.data, buyer=signed.signer == found.buyer)
        if len(after.agreed) != 2 or len({_payload(copy) for copy in after.agreed}) != 1:
            return after
        papers = papers_of(self._context, connection, after)
        return ending.agree(self._context, connection, after, papers, now=now)

    async def run_chores(self) -> int:
        """Let time act on open disputes, up to a bound per round; how many were looked at.

        Each is one operation of its own: a damaged one must not keep the others from ending.
        """
        now, after, looked = self._context.now(), 0, 0
        while looked < DISPUTES_PER_ROUND_MAX:
            page = await self._context.store.read(
                partial(store.due, now=now, after=after, limit=_CHORES_PAGE)
            )
            for number, dispute in page:
                after, looked = number, looked + 1
                await self._try_progress(dispute)
            if len(page) < _CHORES_PAGE:
                break
        return looked

    async def _try_progress(self, dispute: str) -> None:
        try:
            await self._context.store.submit(
                lambda connection: self._progress(connection, dispute, self._context.now())
            )
        except Exception:
            log.exception("dispute %s could not go on", dispute)

    def _progress(self, connection: Connection, name: str, now: int) -> None:
        dispute = store.find(connection, name)
        if dispute is not None and dispute.open:
            papers = papers_of(self._context, connection, dispute)
            self._go_on(connection, dispute, papers, now)

    def _go_on(self, connection: Connection, dispute: Dispute, papers: Papers, now: int) -> Dispute:
        """What follows now: a ruling, a draw, or nothing yet."""
        context = self._context
        escrow = current(context, connection, dispute.agreement_hash, now=now)
        case = case_of(connection, dispute, papers, escrow, ended="evidence", now=now)
        if rulings.proven(case):
            return ending.rule(context, connection, dispute, papers, ended="evidence", now=now)
        if papers.done == {dispute.buyer, dispute.seller}:
            return ending.rule(context, connection, dispute, papers, ended="done", now=now)
        checked = dispute.claim == "wrong_result" and case.agreement.verification == "det"
        if checked and (dispute.check_until is None or now > dispute.check_until):
            drawn = checkers.draw(context, connection, dispute, papers, now=now)
            if drawn is not None:
                return drawn
        if now > dispute.deadline:
            return ending.rule(context, connection, dispute, papers, ended="deadline", now=now)
        return dispute

    def _open(self, body: bytes, kind: type[M]) -> Signed[M]:
        found = envelope.decode(body, size_max=min(kind.SIZE_MAX, DISPUTE_DOCUMENT_BYTES_MAX))
        return codec.open_decoded(found, kind, network=self._context.settings.network)

    def _check_date(self, issued_at: int, now: int) -> None:
        if issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The document is dated in the future.")


_CHORES_PAGE = 64


def _payload(data: bytes) -> bytes:
    return envelope.decode(data).payload


def _of_party(connection: Connection, name: str, peer: str) -> Dispute:
    """A dispute that the peer is a party of. Raises LumarisError `not_found` for a stranger."""
    found = store.find(connection, name)
    if found is None or peer not in (found.buyer, found.seller):
        raise LumarisError("not_found", "There is no such dispute of yours.")
    return found
