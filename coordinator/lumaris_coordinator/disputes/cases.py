"""From rows to a case: what the rules are asked about."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.store import Bundle, Dispute
from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import agreements, codec, dispute_file
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.messages.dispute import DisputeEvidence, DisputeOpen, Ended, Facts
from lumaris_protocol.rulings import Case, Dossier


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


def papers_of(bundles: Sequence[Bundle], *, network: str) -> Papers:
    """All that was shown, verified again: a damaged row is not ruled on.

    It costs up to some hundred signatures, so it is done outside of the writer.
    """
    opened = codec.open_signed(bundles[0].envelope, DisputeOpen, network=network).message
    contract = agreements.join(
        opened.agreement_by_buyer, opened.agreement_by_seller, network=network
    )
    dossier = Dossier(contract, network=network)
    dossier.add(opened.evidence, party=opened.opener)
    for bundle in bundles[1:]:
        message = codec.open_signed(bundle.envelope, DisputeEvidence, network=network).message
        dossier.add(message.evidence, party=bundle.party)
    return Papers(opened, contract, dossier, tuple(bundles))


def with_bundle(papers: Papers, signed: Signed[DisputeEvidence]) -> Papers:
    """The papers with a party's next bundle. Raises EnvelopeError or RefusedError."""
    message = signed.message
    n = sum(bundle.party == signed.signer for bundle in papers.bundles[1:])
    dispute_file.check_bundle(signed, papers.opened, papers.contract, n=n)
    papers.dossier.add(message.evidence, party=signed.signer)
    bundle = Bundle(len(papers.bundles), signed.signer, message.done, signed.hash, signed.data)
    return replace(papers, bundles=(*papers.bundles, bundle))


def check_others(dossier: Dossier, drawn: Collection[str]) -> None:
    """Only what a drawn checker ran is shown of other sessions. Raises RefusedError."""
    sellers = {session.contract.agreement.seller for session in dossier.others.values()}
    if sellers - set(drawn):
        raise RefusedError("evidence_foreign", "Another session is evidence of a drawn checker.")


def case_of(
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    escrow: Escrow,
    *,
    ended: Ended,
) -> Case:
    """The case as it stands now."""
    facts = Facts(
        paid_nanos=escrow.paid,
        claimed_nanos=claimed_of(connection, escrow),
        refunded_nanos=store.refunded(connection, escrow.agreement_hash),
        refunded_orders=store.refunded_orders(connection, escrow.agreement_hash),
        remainder_nanos=escrow.remainder if dispute.frozen else 0,
        bond_nanos=dispute.bond,
        stake_nanos=dispute.stake,
        ended=ended,
        opened_at=dispute.opened_at,
        evidence_until=dispute.evidence_until,
        ends_at=escrow.not_after,
        checkers=tuple(checker for checker, _ in store.draws(connection, dispute.id)),
    )
    return Case(papers.contract, papers.opened, papers.dossier, facts)


def claimed_of(connection: Connection, escrow: Escrow) -> int:
    """What the seller was paid on its own documents: its claim, and awards of its disputes.

    A voucher that only the buyer showed may never have reached the seller.
    """
    awards = escrows.awarded(connection, escrow.agreement_hash)
    return min(escrow.paid, (escrow.claimed_total or 0) + awards)
