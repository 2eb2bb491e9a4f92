"""From rows to a case: what the rules are asked about. Runs inside an operation of the writer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.store import Bundle, Dispute
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import agreements, codec
from lumaris_protocol.agreements import Contract
from lumaris_protocol.limits import REPLICAS_MAX
from lumaris_protocol.messages.dispute import DisputeEvidence, DisputeOpen, Ended, Facts
from lumaris_protocol.rulings import Case, Dossier
from lumaris_protocol.rulings.case import NEEDS_CLAIM

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


@dataclass(frozen=True)
class Papers:
    """A dispute's documents, opened again."""

    opened: DisputeOpen
    contract: Contract
    dossier: Dossier
    bundles: tuple[Bundle, ...]

    @property
    def done(self) -> frozenset[str]:
        """The parties that have no more to show."""
        return frozenset(bundle.party for bundle in self.bundles if bundle.done)

    def answered(self, opener: str) -> bool:
        """Whether the other side has shown something."""
        return any(bundle.party != opener for bundle in self.bundles)


def papers_of(context: Context, connection: Connection, dispute: Dispute) -> Papers:
    """All that was shown, verified again: a damaged row is not ruled on."""
    network = context.settings.network
    bundles = tuple(store.bundles(connection, dispute.id))
    opened = codec.open_signed(bundles[0].envelope, DisputeOpen, network=network).message
    contract = agreements.join(
        opened.agreement_by_buyer, opened.agreement_by_seller, network=network
    )
    dossier = Dossier(contract, network=network)
    dossier.add(opened.evidence, party=opened.opener)
    for bundle in bundles[1:]:
        message = codec.open_signed(bundle.envelope, DisputeEvidence, network=network).message
        dossier.add(message.evidence, party=bundle.party)
    return Papers(opened, contract, dossier, bundles)


def case_of(
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    escrow: Escrow,
    *,
    ended: Ended,
    now: int,
) -> Case:
    """The case as it stands now."""
    paid = escrow.paid
    if dispute.claim in NEEDS_CLAIM:
        # A voucher that only the buyer showed may never have reached the seller.
        paid = min(paid, escrow.claimed_total or 0)
    facts = Facts(
        paid_nanos=paid,
        remainder_nanos=escrow.remainder if dispute.frozen else 0,
        bond_nanos=dispute.bond,
        stake_nanos=dispute.stake,
        ended=ended,
        opened_at=dispute.opened_at,
        evidence_until=dispute.evidence_until,
        checkers=tuple(checker for checker, _ in store.draws(connection, dispute.id)),
        replicas=_replicas(connection, dispute, papers.dossier, now=now),
    )
    return Case(papers.contract, papers.opened, papers.dossier, facts)


def _replicas(
    connection: Connection, dispute: Dispute, dossier: Dossier, *, now: int
) -> tuple[str, ...]:
    """Of the sellers whose results were shown, those that count."""
    shown = [session.contract.agreement.seller for session in dossier.others.values()]
    owners = set(_owners(connection, (dispute.buyer, dispute.seller)))
    found: list[str] = []
    for peer in dict.fromkeys(shown):
        if peer in (dispute.buyer, dispute.seller):
            continue
        standing = store.seller_with_bond(connection, peer, currency=dispute.currency, now=now)
        if standing is None or standing in owners:
            continue
        owners.add(standing)
        found.append(peer)
    return tuple(found[:REPLICAS_MAX])


def _owners(connection: Connection, peers: Iterable[str]) -> list[str]:
    """Who owns each peer: its user, or the peer itself."""
    rows = (
        first(connection, "SELECT coalesce(owner, peer) FROM peer WHERE peer = ?", (peer,))
        for peer in peers
    )
    return [str(row[0]) for row in rows if row]
