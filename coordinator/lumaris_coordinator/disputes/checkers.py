"""Drawing the checker of a disputed result. Runs inside an operation of the writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.cases import Papers
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.receipts.service import append_document
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, merkle, rulings
from lumaris_protocol.ids import digest
from lumaris_protocol.limits import CHECKERS_MAX
from lumaris_protocol.messages.dispute import CheckerDraw
from lumaris_protocol.notes import parse

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


def draw(
    context: Context, connection: Connection, dispute: Dispute, papers: Papers, *, now: int
) -> Dispute | None:
    """Draw a checker, or the next one; the dispute after it.

    None when there is none to draw: the opening is in no signed head of the log yet, no seller may
    check, or as many as allowed were drawn.
    """
    drawn = [checker for checker, _ in store.draws(connection, dispute.id)]
    head = store.checkpoint_over(connection, digest(papers.bundles[0].envelope))
    candidates = store.sellers_with_bond(connection, dispute, drawn=drawn, now=now)
    if len(drawn) >= CHECKERS_MAX or head is None or not candidates:
        return None
    note = head[1]
    root = merkle.parse_checkpoint(parse(note).text).root
    checker = rulings.draw(candidates, root=root, dispute=dispute.id, round_=len(drawn))
    message = CheckerDraw(
        dispute=dispute.id,
        round=len(drawn),
        checkpoint=note,
        candidates=tuple(candidates),
        checker=checker,
        check_by=now + context.settings.dispute_check_s,
        issued_at=now,
    )
    key = context.keys.signer(papers.contract.agreement.coordinator)
    signed = codec.sign(message, key, context.settings.network)
    after = store.advance(
        connection, dispute, "draw", evidence=signed.hash, now=now, check_until=message.check_by
    )
    store.add_draw(connection, dispute.id, round_=len(drawn), checker=checker, envelope=signed.data)
    append_document(connection, signed.data)
    emit(
        connection,
        "dispute.checking",
        ref=dispute.id,
        parties=(dispute.buyer, dispute.seller),
        body={"checker": checker, "round": len(drawn), "check_by": message.check_by},
        now=now,
    )
    return after
