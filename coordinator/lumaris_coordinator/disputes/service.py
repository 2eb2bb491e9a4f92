"""What parties do to a dispute, and what time does to it.

Each signed document is its own idempotency key: the same bytes change nothing and find the dispute
as it is. The outer signature is checked first, then how much its signer sends, then what the rows
say: what is refused anyway costs no more. Evidence is opened outside of the writer; what follows
from it is decided in one operation, for which it is opened again when more has come in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from lumaris_coordinator.bounds import (
    BUCKETS_MAX,
    DISPUTE_DOCUMENTS_BURST,
    DISPUTE_DOCUMENTS_RATE,
    DISPUTE_RETRY_S,
    DISPUTE_THREADS_MAX,
    DISPUTE_TRIES_MAX,
    DISPUTES_PER_ROUND_MAX,
)
from lumaris_coordinator.disputes import checkers, ending, store
from lumaris_coordinator.disputes.cases import (
    Papers,
    case_of,
    check_others,
    papers_of,
    with_bundle,
)
from lumaris_coordinator.disputes.opening import Opening, check_early, open_dispute, open_papers
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.escrow.disputed import current, give_back
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.limits.gcra import Buckets
from lumaris_coordinator.limits.limiter import RateLimitedError
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, envelope, rulings
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
from lumaris_protocol.rulings.work import voucher_top

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

# Looks at a dispute's rows: the dispute, and whether it is to be left as it is.
Check = Callable[[Connection], tuple[Dispute, bool]]
# What follows, with all that was shown.
Act = Callable[[Connection, Dispute, Papers], Dispute]


class Disputes:
    """The rules of disputing."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._threads: anyio.CapacityLimiter | None = None
        self._rates = Buckets(
            "disputes",
            rate=DISPUTE_DOCUMENTS_RATE,
            burst=DISPUTE_DOCUMENTS_BURST,
            size=BUCKETS_MAX,
        )

    async def open(self, body: bytes) -> Dispute:
        """Open a dispute for a signed DisputeOpen; a proven contradiction is ruled on at once.

        Raises EnvelopeError or RefusedError for documents that do not hold, and LumarisError:
        `not_found`, `not_disputable`, `evidence_insufficient`, `dispute_open`, `no_funds`,
        `too_many_holds`, `over_cap`, `rate_limited`, `busy`.
        """
        context, now = self._context, self._context.now()
        signed = self._open(body, DisputeOpen)
        message = signed.message
        if signed.signer != message.opener:
            raise EnvelopeError("wrong_signer", "An opening is signed by its opener.")
        self._check_date(message.issued_at, now)
        if message.coordinator not in context.keys.names():
            raise EnvelopeError("wrong_domain", "The dispute names another coordinator.")

        def look(connection: Connection) -> Dispute | None:
            held = _held(connection, signed)
            if held is None:
                check_early(connection, message)
            return held

        held = await context.store.read(look)
        if held is not None:
            return held
        network = context.settings.network
        opening = await self._in_thread(partial(open_papers, signed, network=network))
        return await context.store.submit(lambda connection: self._opened(connection, opening, now))

    def _opened(self, connection: Connection, opening: Opening, now: int) -> Dispute:
        held = _held(connection, opening.signed)
        if held is not None:
            return held
        dispute = open_dispute(self._context, connection, opening, now=now)
        return self._go_on(connection, dispute, opening.papers, now)

    async def add_evidence(self, dispute: str, body: bytes) -> Dispute:
        """Keep a party's signed DisputeEvidence; the dispute after it, which it may have ended.

        Raises EnvelopeError or RefusedError for evidence that is not admitted, and LumarisError:
        `not_found`, `dispute_closed`, `out_of_sequence`, `rate_limited`, `busy`.
        """
        now = self._context.now()
        signed = self._open(body, DisputeEvidence)
        self._check_date(signed.message.issued_at, now)
        if signed.message.dispute != dispute:
            raise EnvelopeError("wrong_domain", "The evidence names another dispute.")
        return await self._act(
            partial(_check_turn, signed=signed, now=now),
            partial(self._add, signed=signed, now=now),
            shown=signed,
        )

    def _add(
        self,
        connection: Connection,
        dispute: Dispute,
        papers: Papers,
        *,
        signed: Signed[DisputeEvidence],
        now: int,
    ) -> Dispute:
        drawn = [checker for checker, _ in store.draws(connection, dispute.id)]
        check_others(papers.dossier, drawn)
        after = store.advance(
            connection,
            dispute,
            "evidence",
            evidence=signed.hash,
            now=now,
            vouchered=voucher_top(papers.dossier.main),
        )
        store.add_bundle(connection, dispute.id, papers.bundles[-1], now=now)
        emit(
            connection,
            "dispute.evidence",
            ref=dispute.id,
            parties=(dispute.buyer, dispute.seller),
            body={"by": signed.signer, "n": signed.message.n, "done": signed.message.done},
            now=now,
        )
        return self._go_on(connection, after, papers, now)

    async def withdraw(self, dispute: str, body: bytes) -> Dispute:
        """The opener takes its claim back. Raises EnvelopeError, or LumarisError `not_found`,
        `forbidden`, `dispute_closed`, `rate_limited`, `busy`."""
        now = self._context.now()
        signed = self._open(body, DisputeWithdraw)
        message = signed.message
        if message.dispute != dispute or message.party != signed.signer:
            raise EnvelopeError("wrong_domain", "The withdrawal is not for this dispute.")

        def check(connection: Connection) -> tuple[Dispute, bool]:
            found = _of_party(connection, dispute, signed.signer)
            if found.withdrawal == signed.data:
                return found, True
            if signed.signer != found.opener:
                raise LumarisError("forbidden", "Only its opener can withdraw a dispute.")
            if message.agreement_hash != found.agreement_hash:
                raise LumarisError("wrong_domain", "The withdrawal names another agreement.")
            if not found.open:
                raise LumarisError("dispute_closed")
            return found, False

        return await self._act(
            check,
            lambda connection, found, papers: ending.withdraw(
                self._context, connection, found, papers, body, now=now
            ),
        )

    async def split(self, dispute: str, body: bytes) -> Dispute:
        """Keep one side's signed DisputeSplit; with the other side's equal one the dispute ends.

        Raises EnvelopeError, or LumarisError `not_found`, `dispute_closed`, `over_cap`, `no_funds`,
        `rate_limited`, `busy`.
        """
        now = self._context.now()
        signed = self._open(body, DisputeSplit)
        if signed.message.dispute != dispute:
            raise EnvelopeError("wrong_domain", "The split is not for this dispute.")

        def check(connection: Connection) -> tuple[Dispute, bool]:
            found = _of_party(connection, dispute, signed.signer)
            if signed.data in (found.split_by_buyer, found.split_by_seller):
                return found, True
            if not found.open:
                raise LumarisError("dispute_closed")
            if signed.message.agreement_hash != found.agreement_hash:
                raise LumarisError("wrong_domain", "The split names another agreement.")
            return found, False

        return await self._act(check, partial(self._split, signed=signed, now=now))

    def _split(
        self,
        connection: Connection,
        found: Dispute,
        papers: Papers,
        *,
        signed: Signed[DisputeSplit],
        now: int,
    ) -> Dispute:
        after = store.save_split(connection, found, signed.data, buyer=signed.signer == found.buyer)
        if len(after.agreed) != 2 or len({_payload(copy) for copy in after.agreed}) != 1:
            return after
        return ending.agree(self._context, connection, after, papers, now=now)

    async def _act(
        self, check: Check, act: Act, *, shown: Signed[DisputeEvidence] | None = None
    ) -> Dispute:
        """Do what `check` lets pass, with the papers opened before: it is asked again then.

        Raises LumarisError `busy` when more kept coming in between, and what both raise.
        """
        for _ in range(DISPUTE_TRIES_MAX):
            found, rests = await self._context.store.read(check)
            if rests:
                return found
            papers = await self._papers(found, shown)
            after = await self._context.store.submit(
                partial(_act_on, check=check, act=act, papers=papers, more=int(shown is not None))
            )
            if after is not None:
                return after
        raise LumarisError("busy", "Others are showing evidence in this dispute right now.")

    async def _papers(
        self, dispute: Dispute, shown: Signed[DisputeEvidence] | None = None
    ) -> Papers:
        bundles = await self._context.store.scan(partial(store.bundles, dispute=dispute))
        network = self._context.settings.network

        def opened() -> Papers:
            papers = papers_of(bundles, network=network)
            return papers if shown is None else with_bundle(papers, shown)

        return await self._in_thread(opened)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._threads is None:  # it belongs to the event loop, which begins after us
            self._threads = anyio.CapacityLimiter(DISPUTE_THREADS_MAX)
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    async def run_chores(self) -> int:
        """Let time act on open disputes, up to a bound per round; how many were looked at.

        Each is one operation of its own: a damaged one must not keep the others from ending, and
        what could not go on comes behind what was not looked at.
        """
        now = self._context.now()
        names = await self._context.store.read(
            partial(store.due, now=now, limit=DISPUTES_PER_ROUND_MAX)
        )
        for name in names:
            try:
                await self._progress(name)
            except Exception:
                log.exception("dispute %s could not go on", name)
                later = now + DISPUTE_RETRY_S
                await self._context.store.submit(partial(store.set_due, dispute=name, at=later))
        return len(names)

    async def _progress(self, name: str) -> None:
        context = self._context
        dispute = await context.store.read(partial(store.find, dispute=name))
        if dispute is None:
            return
        papers = await self._papers(dispute)
        now = context.now()

        def operation(connection: Connection) -> None:
            found = store.find(connection, name)
            unchanged = found is not None and len(papers.bundles) == len(
                store.shown(connection, found)
            )
            if found is not None and found.open and unchanged:
                self._go_on(connection, found, papers, now)

        await context.store.submit(operation)

    def _go_on(self, connection: Connection, dispute: Dispute, papers: Papers, now: int) -> Dispute:
        """What follows now: a ruling, a list, a draw, or nothing yet."""
        context = self._context
        escrow = current(context, connection, dispute.agreement_hash, now=now)
        case = case_of(connection, dispute, papers, escrow, ended="evidence")
        if rulings.proven(case):
            return ending.rule(context, connection, dispute, papers, ended="evidence", now=now)
        if papers.done == {dispute.buyer, dispute.seller} and not rulings.check_due(case):
            return ending.rule(context, connection, dispute, papers, ended="done", now=now)
        checked = dispute.claim == "wrong_result"
        if checked and (dispute.check_until is None or now > dispute.check_until):
            after = checkers.go_on(context, connection, dispute, papers, now=now)
            if after is not None:
                # A list is drawn from once it stands in a signed head: in the next round.
                store.set_due(connection, dispute.id, after.check_until or now)
                return after
        if now > dispute.deadline:
            return ending.rule(context, connection, dispute, papers, ended="deadline", now=now)
        due_at = dispute.deadline
        if checked:
            due_at = min(due_at, now + DISPUTE_RETRY_S)
        elif dispute.frozen:
            due_at = self._unfreeze(connection, dispute, escrow, now)
        store.set_due(connection, dispute.id, due_at)
        return dispute

    def _unfreeze(self, connection: Connection, dispute: Dispute, escrow: Escrow, now: int) -> int:
        """Give back what nobody asks for once the window has ended; when to look again."""
        if now <= escrow.settle_by:
            return min(dispute.deadline, escrow.settle_by)
        asked, vouchered = store.asked_for(connection, escrow.agreement_hash)
        keep = asked + max(0, vouchered - escrow.paid)
        give_back(self._context, connection, escrow.agreement_hash, keep=keep, now=now)
        return dispute.deadline

    def _open(self, body: bytes, kind: type[M]) -> Signed[M]:
        found = envelope.decode(body, size_max=min(kind.SIZE_MAX, DISPUTE_DOCUMENT_BYTES_MAX))
        signed = codec.open_decoded(found, kind, network=self._context.settings.network)
        outcome = self._rates.take(signed.signer, now=self._context.clock())
        if not outcome.allowed:
            raise RateLimitedError(outcome)
        return signed

    def _check_date(self, issued_at: int, now: int) -> None:
        if issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The document is dated in the future.")


def _act_on(
    connection: Connection, *, check: Check, act: Act, papers: Papers, more: int
) -> Dispute | None:
    """None when other evidence came in since the papers were opened; `more` of them is new."""
    found, rests = check(connection)
    if rests:
        return found
    if len(store.shown(connection, found)) + more != len(papers.bundles):
        return None
    return act(connection, found, papers)


def _check_turn(
    connection: Connection, *, signed: Signed[DisputeEvidence], now: int
) -> tuple[Dispute, bool]:
    """Whether it is this bundle's turn; True when it is kept already. Raises LumarisError."""
    dispute = _of_party(connection, signed.message.dispute, signed.signer)
    entries = store.shown(connection, dispute)
    if any(entry.hash == signed.hash for entry in entries):
        return dispute, True
    if not dispute.open or now > dispute.deadline:
        raise LumarisError("dispute_closed", "The time for evidence is over.")
    own = [entry for entry in entries[1:] if entry.party == signed.signer]
    # Where a second run is awaited, a last word that came before it is none.
    done = dispute.claim != "wrong_result" and any(entry.done for entry in own)
    if done or len(own) >= EVIDENCE_BUNDLES_MAX:
        raise LumarisError("dispute_closed", "This party has no more to show.")
    if signed.message.n != len(own):
        raise LumarisError("out_of_sequence", f"The next bundle has the number {len(own)}.")
    return dispute, False


def _held(connection: Connection, signed: Signed[DisputeOpen]) -> Dispute | None:
    """The dispute that this opening has led to. Raises LumarisError `dispute_open` when another
    opening made the same claim."""
    held = store.find(connection, signed.message.dispute)
    if held is not None and held.opened != signed.hash:
        raise LumarisError("dispute_open", "This claim was made before, in other words.")
    return held


def _payload(data: bytes) -> bytes:
    return envelope.decode(data).payload


def _of_party(connection: Connection, name: str, peer: str) -> Dispute:
    """A dispute that the peer is a party of. Raises LumarisError `not_found` for a stranger."""
    found = store.find(connection, name)
    if found is None or peer not in (found.buyer, found.seller):
        raise LumarisError("not_found", "There is no such dispute of yours.")
    return found
