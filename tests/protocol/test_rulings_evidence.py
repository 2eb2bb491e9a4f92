"""What opens a dispute, what is admitted as evidence, draws, and that no money is made or lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from lumaris_protocol import codec, dispute_file, rulings
from lumaris_protocol.agreements import Contract
from lumaris_protocol.coordinator_api import ANSWER_BYTES_MAX
from lumaris_protocol.dispute_file import DisputeFile, DrawEntry, RulingEntry
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    AGREEMENT_BYTES_MAX,
    CHECKERS_MAX,
    CHECKPOINT_CHARS_MAX,
    DISPUTE_DOCUMENT_BYTES_MAX,
    DISPUTE_FILE_BYTES_MAX,
    DISPUTE_FRAME_BYTES_MAX,
    ENVELOPE_BYTES_MAX,
    EVIDENCE_BUNDLES_MAX,
    EVIDENCE_BYTES_MAX,
    EVIDENCE_DOCUMENTS_MAX,
    OTHER_SESSIONS_MAX,
)
from lumaris_protocol.messages.dispute import Candidate, DisputeEvidence, DisputeOpen
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.receipt import LogProof
from lumaris_protocol.rulings import Dossier, Finding
from tests.dispute_builders import bundle, opening, padded
from tests.protocol import parties as p
from tests.protocol.cases import (
    CAP,
    CHECKER,
    CHECKER_SESSION,
    EXPOSURE,
    case,
    claim_of,
    contract,
    other_work,
    ruled,
    work,
)

# --- openings ---


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"by": p.STRANGER}, "wrong_signer"),
        ({"coordinator": p.STRANGER.peer_id}, "wrong_domain"),
        ({"dispute": p.id_of("dispute", "x")}, "malformed"),
        ({"by": p.SELLER}, "not_disputable"),
        ({"claim": "unpaid_delivery"}, "not_disputable"),
        ({"claim": "stale_voucher"}, "not_disputable"),
        ({"order": 1}, "not_disputable"),
        ({"claim": "wrong_result"}, "not_disputable"),
        ({"claim": "wrong_result", "order": 1, "verification": "evid"}, "not_disputable"),
        ({"claim": "wrong_result", "order": 1, "tier": "container"}, "not_disputable"),
        ({"claim": "wrong_result", "order": 1, "egress": ("a.example:443",)}, "not_disputable"),
    ],
)
def test_openings_that_do_not_fit(changes: dict[str, Any], code: str) -> None:
    terms = {
        name: changes.pop(name) for name in ("verification", "tier", "egress") if name in changes
    }
    agreed, key = contract(**terms), changes.pop("by", p.BUYER)
    claim = changes.pop("claim", "not_delivered")
    data = opening(agreed, p.grant(agreed).data, key, claim, network=p.NETWORK, **changes)
    opened = codec.open_signed(data, DisputeOpen, network=p.NETWORK).message
    with pytest.raises(RefusedError) as caught:
        rulings.check_opening(opened, agreed)
    assert caught.value.code == code


def test_bonds_grow_with_what_is_asked() -> None:
    assert rulings.opener_bond(0) == 1_000_000
    assert rulings.opener_bond(100_000_000) == 12_000_000
    assert rulings.opener_bond(10_000_001) == 1_200_001  # rounded up


# --- what is admitted ---


def refused(*documents: bytes, party: KeyPair = p.BUYER, agreed: Contract | None = None) -> str:
    dossier = Dossier(agreed or contract(), network=p.NETWORK)
    with pytest.raises(LumarisError) as caught:
        dossier.add(documents, party=party.peer_id)
    assert not dossier.main.documents
    assert not dossier.others
    return caught.value.code


def flip(data: bytes, position: int = -1) -> bytes:
    changed_ = bytearray(data)
    changed_[position] ^= 1
    return bytes(changed_)


def test_foreign_and_forged_documents_are_not_admitted() -> None:
    made = work()
    good = made.order()
    foreign = p.id_of("session", "other")
    assert refused(good, made.order(2, key=p.STRANGER)) == "evidence_foreign"
    assert refused(good, made.order(2, key=p.BUYER)) == "evidence_foreign"  # the identity key
    assert refused(good, made.delivery(key=p.BUYER_SESSION)) == "evidence_foreign"  # wrong side
    assert refused(good, made.order(2, session=foreign)) == "evidence_foreign"
    assert refused(good, made.order(2, network="othernet")) == "bad_signature"
    assert refused(good, flip(made.order(2))) == "bad_signature"
    assert refused(good, b"junk") == "malformed"
    assert refused(good, p.advert().data) == "evidence_foreign"
    assert refused(good, p.grant(made.contract).data) == "evidence_foreign"
    assert refused(good, made.contract.by_buyer) == "evidence_foreign"  # half an agreement
    assert refused(claim_of(made, p.STRANGER, 0, None)) == "evidence_foreign"


def test_the_room_of_one_side_is_bounded() -> None:
    made = work()
    command = "x" * (30 * 1024)
    large = [made.order(n, command=command) for n in range(1, 18)]
    assert sum(map(len, large)) > EVIDENCE_BYTES_MAX // 2
    assert refused(*large) == "oversize"
    assert refused(*[made.cancel(n) for n in range(1, EVIDENCE_DOCUMENTS_MAX + 2)]) == "oversize"
    dossier = Dossier(made.contract, network=p.NETWORK)
    dossier.add(large[:16], party=p.BUYER.peer_id)
    with pytest.raises(RefusedError, match="oversize"):
        dossier.add(large[:2], party=p.BUYER.peer_id)
    dossier.add(large[:2], party=p.SELLER.peer_id)  # its own half is untouched
    assert len(dossier.main.documents) == 16
    small = Dossier(made.contract, network=p.NETWORK)
    for n in range(EVIDENCE_DOCUMENTS_MAX):
        small.add((made.cancel(n + 1),), party=p.BUYER.peer_id)
    with pytest.raises(RefusedError, match="oversize"):
        small.add((made.cancel(1),), party=p.BUYER.peer_id)


def test_another_session_needs_an_agreement_that_the_party_bought() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    assert refused(theirs.order()) == "evidence_foreign"
    assert refused(*theirs.agreements, party=p.SELLER) == "evidence_foreign"
    assert refused(theirs.agreements[1], theirs.agreements[1]) == "evidence_foreign"
    strangers = other_work(CHECKER, CHECKER_SESSION, buyer=p.STRANGER)
    assert refused(*strangers.agreements) == "evidence_foreign"
    twin = replace(theirs, contract=contract(agreement=p.id_of("agreement", "twin")))
    assert refused(*twin.agreements) == "evidence_foreign"  # our session under other terms
    dossier = Dossier(contract(), network=p.NETWORK)
    dossier.add(theirs.agreements, party=p.BUYER.peer_id)
    dossier.add((theirs.order(),), party=p.BUYER.peer_id)
    assert len(dossier.others[theirs.contract.hash].documents) == 1


def test_too_many_other_sessions() -> None:
    sessions = [
        other_work(p.key_of(f"r{number}"), p.key_of(f"r{number} session")).agreements
        for number in range(8)
    ]
    assert refused(*(copy for pair in sessions for copy in pair)) == "oversize"


# --- draws ---


def candidates(*weights: int) -> list[Candidate]:
    return [
        Candidate(peer=p.key_of(f"candidate {number}").peer_id, weight_nanos=weight)
        for number, weight in enumerate(weights)
    ]


def test_a_draw_follows_from_root_dispute_and_round_alone() -> None:
    names, dispute = candidates(5, 6, 7), p.id_of("dispute", "1")
    first = rulings.draw(names, root=bytes(32), dispute=dispute, round_=0)
    assert first == rulings.draw(names[::-1], root=bytes(32), dispute=dispute, round_=0)
    drawn = {
        rulings.draw(names, root=bytes([n] * 32), dispute=dispute, round_=0) for n in range(64)
    }
    assert drawn == {candidate.peer for candidate in names}


def test_a_draw_follows_the_weights() -> None:
    names = candidates(1, 9_999)
    dispute = p.id_of("dispute", "1")
    drawn = [
        rulings.draw(names, root=bytes([n] * 32), dispute=dispute, round_=0) for n in range(64)
    ]
    assert drawn.count(names[1].peer) == 64


def test_bad_lists_of_candidates() -> None:
    dispute = p.id_of("dispute", "1")
    for names in ([], candidates(1) * 2):
        with pytest.raises(RefusedError, match="dispute_invalid"):
            rulings.draw(names, root=bytes(32), dispute=dispute, round_=0)
    names = candidates(1, 2)
    with pytest.raises(RefusedError, match="dispute_invalid"):
        rulings.check_candidates(names, parties=(names[0].peer,))
    rulings.check_candidates(names, parties=(p.BUYER.peer_id,))
    for drawn in names:
        found = rulings.draw(names, root=bytes(32), dispute=dispute, round_=1, drawn=(drawn.peer,))
        assert found != drawn.peer
    with pytest.raises(RefusedError, match="dispute_invalid"):
        rulings.draw(
            names, root=bytes(32), dispute=dispute, round_=1, drawn=[name.peer for name in names]
        )


# --- money ---

AMOUNTS = st.integers(min_value=0, max_value=10**12)
CLAIMS = st.sampled_from(("not_delivered", "unpaid_delivery", "equivocation"))


@given(
    claim=CLAIMS,
    fault=st.sampled_from(("buyer", "seller", "neither")),
    award=AMOUNTS,
    refund=AMOUNTS,
    fine=AMOUNTS,
    paid=AMOUNTS,
    remainder=AMOUNTS,
    bond=AMOUNTS,
    stake=AMOUNTS,
)
def test_a_decision_conserves_money(
    claim: Any,
    fault: Any,
    award: int,
    refund: int,
    fine: int,
    paid: int,
    remainder: int,
    bond: int,
    stake: int,
) -> None:
    by = p.SELLER if claim == "unpaid_delivery" else p.BUYER
    held = case(
        SHARED,
        claim,
        by=by,
        paid_nanos=paid,
        remainder_nanos=remainder,
        bond_nanos=bond,
        stake_nanos=stake,
    )
    found = rulings.decide(held, Finding(fault, "any", award, refund=refund, penalty=fine))
    assert 0 <= found.award_nanos <= remainder
    assert 0 <= found.collected_nanos <= found.slash_nanos
    source = stake if found.bond_returned else bond
    assert found.collected_nanos <= source
    parts = found.refund_nanos + found.victim_nanos + found.fees_nanos
    assert parts == found.collected_nanos
    assert found.refund_nanos <= paid
    assert min(found.refund_nanos, found.victim_nanos, found.fees_nanos) >= 0
    assert found.victim_nanos <= (found.collected_nanos - found.refund_nanos + 1) // 2
    if by is p.SELLER:
        assert found.refund_nanos == 0


SHARED = work()


@given(
    paid=st.integers(0, CAP),
    asked=st.integers(0, CAP),
    stake=st.integers(0, CAP),
    wall_ms=st.integers(0, 70_000),
    shows=st.booleans(),
)
def test_a_refund_is_never_more_than_paid_asked_or_staked(
    paid: int, asked: int, stake: int, wall_ms: int, shows: bool
) -> None:
    made = work(SHARED.contract)
    shown = (made.order(), made.delivery(wall_ms=wall_ms)) if shows else ()
    found = ruled(
        made, "not_delivered", seller=shown, paid_nanos=paid, amount=asked, stake_nanos=stake
    )
    assert found.refund_nanos <= min(paid, asked, stake)


def test_a_split_and_a_withdrawal() -> None:
    held = case(
        work(), "not_delivered", remainder_nanos=50, stake_nanos=40, paid_nanos=90, amount=CAP
    )
    found = rulings.split(held, award_nanos=20, refund_nanos=70)
    assert (found.award_nanos, found.refund_nanos, found.bond_returned) == (20, 70, False)
    # The seller itself pays that; the opener pays for what was held meanwhile.
    assert (found.collected_nanos, found.victim_nanos) == (1_000_000, 500_000)
    assert (found.slash_nanos, found.fees_nanos) == (1_000_000, 500_000)
    assert rulings.split(held, award_nanos=51, refund_nanos=91).refund_nanos == 90
    large = case(work(), "not_delivered", bond_nanos=5_000_000)
    early = rulings.withdrawn(large, answered=False)
    assert (early.fault, early.bond_returned) == ("neither", False)
    assert (early.collected_nanos, early.victim_nanos) == (1_000_000, 500_000)
    late = rulings.withdrawn(large, answered=True)
    assert (late.fault, late.bond_returned, late.award_nanos) == ("buyer", False, 0)
    assert (late.collected_nanos, late.victim_nanos) == (5_000_000, 2_500_000)


def test_what_can_be_given_back() -> None:
    terms = {"fee_bps": 1_000}
    assert rulings.refundable(paid=100, claimed=100, refunded=0, **terms) == 100
    assert rulings.refundable(paid=100, claimed=0, refunded=0, **terms) == 90
    assert rulings.refundable(paid=100, claimed=50, refunded=60, **terms) == 35
    assert rulings.refundable(paid=100, claimed=100, refunded=200, **terms) == 0


def test_no_more_is_staked_than_can_be_lost() -> None:
    held = case(work(), "not_delivered", amount=CAP)
    agreement = held.agreement
    assert rulings.stake_max(held.opened, agreement, refundable=100, price=0) == 110
    wrong = case(work(), "wrong_result", amount=CAP, order=1).opened
    assert rulings.stake_max(wrong, agreement, refundable=100, price=100) == 200
    assert rulings.stake_max(wrong, agreement, refundable=100, price=30) == 60
    assert rulings.stake_max(wrong, agreement, refundable=-1, price=30) == 0
    unpaid = case(work(), "unpaid_delivery", by=p.SELLER, amount=CAP).opened
    assert rulings.stake_max(unpaid, agreement, refundable=0, price=0) == EXPOSURE // 10
    fraud = case(work(), "equivocation", amount=0).opened
    assert rulings.stake_max(fraud, agreement, refundable=0, price=0) == CAP


def test_the_largest_dispute_fits_its_file() -> None:
    """Or the coordinator's own file could not be read, and an honest side could not answer."""
    agreed = contract()
    side, each = EVIDENCE_BYTES_MAX // 2, EVIDENCE_BYTES_MAX // 2 // EVIDENCE_BUNDLES_MAX
    key, dispute = p.BUYER, p.id_of("dispute", "x")
    signed = bundle(agreed, dispute, key, bytes(each), network=p.NETWORK)
    large = padded(signed, key, DISPUTE_FRAME_BYTES_MAX - 1_000, network=p.NETWORK)
    rulings.check_frame(codec.open_signed(large, DisputeEvidence, network=p.NETWORK))
    first = 4 * (side + 2 * AGREEMENT_BYTES_MAX + ENVELOPE_BYTES_MAX) // 3
    proof = LogProof(index=0, size=1, hashes=("sha256:" + "0" * 64,) * 64)
    paper, salt, note = bytes(ENVELOPE_BYTES_MAX), bytes(32), "x" * CHECKPOINT_CHARS_MAX
    file = DisputeFile(
        format="lumaris-dispute/1",
        network=p.NETWORK,
        opened=bytes(min(DISPUTE_DOCUMENT_BYTES_MAX, first)),
        # What of the opener's room its opening does not use is shown in its bundles.
        evidence=(large, *([bytes(len(large) + 1_000)] * (2 * EVIDENCE_BUNDLES_MAX - 1))),
        draws=(DrawEntry(candidates=paper, salt=salt, draw=paper, proof=proof),) * CHECKERS_MAX,
        agreed=(paper, paper),
        ruling=RulingEntry(ruling=paper, salt=salt, proof=proof, checkpoint=note),
    )
    data = dispute_file.encode(file)
    assert len(data) <= min(DISPUTE_FILE_BYTES_MAX, ANSWER_BYTES_MAX)
    assert dispute_file.decode(data) == file


def test_what_is_mostly_blanks_is_no_bundle() -> None:
    agreed = contract()
    shown = bundle(agreed, p.id_of("dispute", "x"), p.BUYER, network=p.NETWORK)
    opened = opening(agreed, p.grant(agreed).data, p.SELLER, "equivocation", network=p.NETWORK)

    def check_bundle(data: bytes) -> None:
        rulings.check_frame(codec.open_signed(data, DisputeEvidence, network=p.NETWORK))

    def check_opening(data: bytes) -> None:
        rulings.check_frame(codec.open_signed(data, DisputeOpen, network=p.NETWORK))

    for check, key, data in ((check_bundle, p.BUYER, shown), (check_opening, p.SELLER, opened)):
        check(data)
        with pytest.raises(RefusedError) as caught:
            check(padded(data, key, DISPUTE_FRAME_BYTES_MAX, network=p.NETWORK))
        assert caught.value.code == "oversize"


def test_the_room_for_other_sessions_is_each_sides_own() -> None:
    dossier = Dossier(contract(), network=p.NETWORK)
    for number in range(OTHER_SESSIONS_MAX):
        theirs = other_work(p.key_of(f"r{number}"), p.key_of(f"r{number} session"), buyer=p.SELLER)
        dossier.add(theirs.agreements, party=p.SELLER.peer_id)
    ours = other_work(CHECKER, CHECKER_SESSION)
    dossier.add(ours.agreements, party=p.BUYER.peer_id)
    more = other_work(p.key_of("more"), p.key_of("more session"), buyer=p.SELLER)
    with pytest.raises(RefusedError, match="oversize"):
        dossier.add(more.agreements, party=p.SELLER.peer_id)


def test_a_checkers_agreement_may_name_another_key_of_the_coordinator() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION, coordinator=p.STRANGER.peer_id)
    dossier = Dossier(contract(), network=p.NETWORK)
    dossier.add((*theirs.agreements, theirs.order()), party=p.BUYER.peer_id)
    assert len(dossier.others) == 1


def test_evidence_cannot_be_another_agreements() -> None:
    """The same documents replayed in a dispute of another session."""
    made = work()
    other: Agreement = changed(made.contract.agreement, session=p.id_of("session", "two"))
    assert refused(made.delivery(), agreed=p.sign_contract(other)) == "evidence_foreign"
    with pytest.raises(EnvelopeError):
        Dossier(made.contract, network="othernet").add((made.delivery(),), party=p.SELLER.peer_id)
