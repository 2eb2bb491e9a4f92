"""Drawing the checkers of a disputed result. Runs inside an operation of the writer.

First the list of candidates and their weights is signed and logged; a draw is made once it stands
in a signed head, from that head's root. Under `det` one checker is drawn, and for a silent one the
next from a list of its own; under `repl` all replicas at once from one list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.cases import Papers
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.receipts.service import append_document, find_document
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, merkle, rulings
from lumaris_protocol.codec import Signed
from lumaris_protocol.limits import CHECKERS_MAX
from lumaris_protocol.messages.dispute import CheckerDraw, CheckerList
from lumaris_protocol.notes import parse

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

# One replica beside the disputed result decides nothing.
_REPLICAS_MIN: Final = 2


def go_on(
    context: Context, connection: Connection, dispute: Dispute, papers: Papers, *, now: int
) -> Dispute | None:
    """Make the next list, or draw from the one that was made; the dispute after it, as it was
    where a list waits for its signed head.

    None when there is none to draw: too few sellers may check, or as many as allowed were drawn.
    """
    drawn = [checker for checker, _ in store.draws(connection, dispute.id)]
    repl = papers.contract.agreement.verification == "repl"
    if len(drawn) >= CHECKERS_MAX or (repl and drawn):
        return None
    listed = store.list_of(connection, dispute.id, round_=len(drawn))
    if listed is None:
        return dispute if make_list(context, connection, dispute, papers, now=now) else None
    head = store.checkpoint_over(connection, listed)
    if head is None:
        return dispute
    filed = find_document(connection, listed)
    assert filed is not None
    network = context.settings.network
    candidates = codec.open_signed(filed.envelope, CheckerList, network=network)
    number = min(CHECKERS_MAX, len(candidates.message.candidates)) if repl else 1
    for _ in range(number):
        dispute = _draw(
            context, connection, dispute, papers, candidates, note=head[1], drawn=drawn, now=now
        )
    return dispute


def make_list(
    context: Context, connection: Connection, dispute: Dispute, papers: Papers, *, now: int
) -> bool:
    """Sign and log among whom the next checker is drawn; whether there is anybody."""
    drawn = [checker for checker, _ in store.draws(connection, dispute.id)]
    candidates = store.sellers_with_bond(
        connection,
        parties=(dispute.buyer, dispute.seller),
        currency=dispute.currency,
        drawn=drawn,
        now=now,
    )
    agreement = papers.contract.agreement
    if len(candidates) < (_REPLICAS_MIN if agreement.verification == "repl" else 1):
        return False
    message = CheckerList(
        dispute=dispute.id, round=len(drawn), candidates=tuple(candidates), issued_at=now
    )
    key = context.keys.signer(agreement.coordinator)
    signed = codec.sign(message, key, context.settings.network)
    append_document(connection, signed.data)
    store.add_list(connection, dispute.id, round_=len(drawn), document=signed.hash)
    return True


def _draw(
    context: Context,
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    listed: Signed[CheckerList],
    *,
    note: str,
    drawn: list[str],
    now: int,
) -> Dispute:
    """One draw; its checker is added to `drawn`."""
    checker = rulings.draw(
        listed.message.candidates,
        root=merkle.parse_checkpoint(parse(note).text).root,
        dispute=dispute.id,
        round_=len(drawn),
        drawn=drawn,
    )
    message = CheckerDraw(
        dispute=dispute.id,
        round=len(drawn),
        list_hash=listed.hash,
        checkpoint=note,
        checker=checker,
        check_by=now + context.settings.dispute_check_s,
        issued_at=now,
    )
    key = context.keys.signer(papers.contract.agreement.coordinator)
    signed = codec.sign(message, key, context.settings.network)
    after = store.advance(
        connection, dispute, "draw", evidence=signed.hash, now=now, check_until=message.check_by
    )
    store.add_draw(
        connection, dispute.id, round_=message.round, checker=checker, envelope=signed.data
    )
    append_document(connection, signed.data)
    drawn.append(checker)
    emit(
        connection,
        "dispute.checking",
        ref=dispute.id,
        parties=(dispute.buyer, dispute.seller),
        body={"checker": checker, "round": message.round, "check_by": message.check_by},
        now=now,
    )
    return after
