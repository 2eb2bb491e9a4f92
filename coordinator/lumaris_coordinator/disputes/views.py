"""What a dispute's parties see of it, and the file that replays it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.receipts.service import find_document
from lumaris_coordinator.receipts.tree import Head
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, dispute_file, merkle
from lumaris_protocol.dispute_file import DisputeFile, DrawEntry, RulingEntry
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from lumaris_protocol.messages.dispute import CheckerDraw, Ruling
from lumaris_protocol.notes import parse

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller
    from lumaris_coordinator.receipts.log import ReceiptLog


async def page(context: Context, caller: Caller, *, after: int, limit: int) -> dict[str, Any]:
    """The disputes of the caller's peers, oldest first; `next` continues after it, null at the
    end."""
    peers = sorted(caller.peers)
    if not peers:
        return {"disputes": [], "next": None}

    def look(connection: Connection) -> dict[str, Any]:
        found = store.page(connection, peers, after=after, limit=limit + 1)
        rows = found[:limit]
        more = len(found) > limit
        return {
            "disputes": [summary(dispute) for dispute in rows],
            "next": rows[-1].number if more else None,
        }

    return await context.store.read(look)


async def show(context: Context, name: str, caller: Caller) -> dict[str, Any]:
    """One dispute with its evidence, draws and history. Raises LumarisError `not_found`."""

    def look(connection: Connection) -> dict[str, Any]:
        dispute = _seen(connection, name, caller)
        return {
            **summary(dispute),
            "evidence": [
                {"n": entry.n, "by": entry.party, "done": entry.done, "hash": entry.hash}
                for entry in store.shown(connection, dispute)
            ],
            "checkers": [checker for checker, _ in store.draws(connection, dispute.id)],
            "ruling": _ruling_of(context, dispute),
            "events": store.events(connection, dispute.id),
        }

    return await context.store.read(look)


def summary(dispute: Dispute) -> dict[str, Any]:
    """A dispute in a list, and the answer to what was sent for it."""
    return {
        "dispute": dispute.id,
        "number": dispute.number,
        "agreement_hash": dispute.agreement_hash,
        "claim": dispute.claim,
        "order": dispute.order_n,
        "opener": dispute.opener,
        "buyer": dispute.buyer,
        "seller": dispute.seller,
        "state": dispute.state,
        "currency": dispute.currency,
        "amount_nanos": dispute.amount,
        "bond_nanos": dispute.bond,
        "stake_nanos": dispute.stake,
        "owed_nanos": dispute.owed,
        "opened_at": dispute.opened_at,
        "evidence_until": dispute.evidence_until,
        "check_until": dispute.check_until,
        "ended_at": dispute.ended_at,
    }


async def file(context: Context, log: ReceiptLog, name: str, caller: Caller) -> bytes:
    """The dispute file. Raises LumarisError `not_found`, or `busy` in the moment before the ruling
    is in a signed head."""
    return await context.store.scan(
        lambda connection: _file(context, log, connection, _seen(connection, name, caller))
    )


def _file(context: Context, log: ReceiptLog, connection: Connection, dispute: Dispute) -> bytes:
    opened, *bundles = store.bundles(connection, dispute)
    found = DisputeFile(
        format="lumaris-dispute/1",
        network=context.settings.network,
        opened=opened.envelope,
        evidence=tuple(bundle.envelope for bundle in bundles),
        draws=tuple(
            _draw_entry(context, log, connection, envelope)
            for _, envelope in store.draws(connection, dispute.id)
        ),
        agreed=dispute.agreed,
        ruling=_entry(log, connection, dispute),
    )
    return dispute_file.encode(found)


def _draw_entry(
    context: Context, log: ReceiptLog, connection: Connection, envelope: bytes
) -> DrawEntry:
    draw = codec.open_signed(envelope, CheckerDraw, network=context.settings.network).message
    listed = find_document(connection, draw.list_hash)
    assert listed is not None
    size = merkle.parse_checkpoint(parse(draw.checkpoint).text).size
    proof = log.prove(connection, listed.leaf, listed.commitment, Head(size, draw.checkpoint))
    return DrawEntry(candidates=listed.envelope, salt=listed.salt, draw=envelope, proof=proof)


def _entry(log: ReceiptLog, connection: Connection, dispute: Dispute) -> RulingEntry | None:
    if dispute.ruling is None:
        return None
    filed = find_document(connection, digest(dispute.ruling))
    assert filed is not None
    head = log.head(connection)
    proof = log.prove(connection, filed.leaf, filed.commitment, head)
    return RulingEntry(ruling=filed.envelope, salt=filed.salt, proof=proof, checkpoint=head.note)


def _ruling_of(context: Context, dispute: Dispute) -> dict[str, Any] | None:
    if dispute.ruling is None:
        return None
    ruling = codec.open_signed(dispute.ruling, Ruling, network=context.settings.network).message
    return {
        "fault": ruling.fault,
        "rule": ruling.rule,
        "award_nanos": ruling.award_nanos,
        "refund_nanos": ruling.refund_nanos,
        "slash_nanos": ruling.slash_nanos,
        "collected_nanos": ruling.collected_nanos,
        "victim_nanos": ruling.victim_nanos,
        "bond_returned": ruling.bond_returned,
    }


def _seen(connection: Connection, name: str, caller: Caller) -> Dispute:
    dispute = store.find(connection, name)
    if dispute is None or not caller.may_see(dispute.buyer, dispute.seller):
        raise LumarisError("not_found", "There is no such dispute of yours.")
    return dispute
