"""Replaying a dispute from its file, without asking anyone.

The file holds the opening, every evidence bundle, the draws of checkers, and the signed ruling with
its place in the receipts log. The replay opens all of it again, repeats the draws, and applies the
same rules to the same case: the ruling is `valid` when it is the one that follows, `invalid` when
anything fails, `unknown` when all holds together but no trusted key signed it, or when there is no
ruling yet. What only the coordinator knows (when documents arrived, what bonds were there) it
states in the ruling's facts; the replay checks them as far as the documents allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lumaris_protocol import (
    agreements,
    codec,
    envelope,
    key_list,
    keys,
    limits,
    merkle,
    notes,
    rulings,
)
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.messages.base import Document, Part
from lumaris_protocol.messages.dispute import (
    CheckerDraw,
    CheckerList,
    DisputeEvidence,
    DisputeOpen,
    DisputeSplit,
    DisputeWithdraw,
    Ruling,
)
from lumaris_protocol.messages.notice import KeyList
from lumaris_protocol.messages.receipt import LogProof
from lumaris_protocol.receipts import Check, Verdict
from lumaris_protocol.rulings import Case, Decision, Dossier

CHECKS = ("form", "opening", "agreement", "evidence", "ruling", "draws", "decision", "log", "trust")

_Bundle = Annotated[bytes, Meta(max_length=limits.DISPUTE_DOCUMENT_BYTES_MAX)]
_Salt = Annotated[bytes, Meta(min_length=merkle.SALT_BYTES, max_length=merkle.SALT_BYTES)]


class DrawEntry(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A signed draw, its list, and the proof that its checkpoint holds that list."""

    candidates: Document
    salt: _Salt
    draw: Document
    proof: LogProof


class RulingEntry(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The signed ruling and its place in the log."""

    ruling: Document
    salt: _Salt
    proof: LogProof
    checkpoint: Annotated[str, Meta(max_length=limits.CHECKPOINT_CHARS_MAX)]


class DisputeFile(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A dispute file. `agreed` are the signed ends: two equal splits, or one withdrawal."""

    format: Literal["lumaris-dispute/1"]
    network: Annotated[
        str, Meta(min_length=1, max_length=limits.NAME_CHARS_MAX, pattern=r"^[^/]+\Z")
    ]
    opened: _Bundle
    evidence: Annotated[tuple[_Bundle, ...], Meta(max_length=2 * limits.EVIDENCE_BUNDLES_MAX)] = ()
    draws: Annotated[tuple[DrawEntry, ...], Meta(max_length=limits.CHECKERS_MAX)] = ()
    agreed: Annotated[tuple[Document, ...], Meta(max_length=2)] = ()
    ruling: RulingEntry | None = None


@dataclass
class Report:
    """What was checked and what it comes to."""

    verdict: Verdict = "invalid"
    checks: list[Check] = field(default_factory=list)
    ruling: Ruling | None = None
    coordinator: str = ""


@dataclass(frozen=True)
class _Opened:
    """A file's content after the signatures of its parties were checked.

    `price_nanos` is that of the disputed result, by the opening alone.
    """

    file: DisputeFile
    opened: Signed[DisputeOpen]
    contract: Contract
    dossier: Dossier
    done: frozenset[str]
    answered: bool
    price_nanos: int


def encode(file: DisputeFile) -> bytes:
    """The bytes of a dispute file."""
    return msgspec.json.format(msgspec.json.encode(file), indent=2)


def decode(data: bytes) -> DisputeFile:
    """A dispute file's content. Raises RefusedError `oversize` or `malformed`."""
    if len(data) > limits.DISPUTE_FILE_BYTES_MAX:
        raise RefusedError("oversize", "The dispute file is too large.")
    try:
        return msgspec.json.decode(data, type=DisputeFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("malformed", f"Not a dispute file: {error}") from None


def verify(data: bytes, *, trusted: frozenset[str], listed: KeyList | None = None) -> Report:
    """Replay a dispute file against the coordinator peer ids in `trusted`. Never raises.

    With the coordinator's key list, which the caller has checked, its keys count as they do for
    receipts (`receipts.verify_bundle`) and `trusted` does not.
    """
    report, trust = Report(), _Trust(trusted, listed)
    try:
        found = _open(report, decode(data), trust)
        signed = _open_ruling(report, found, trust)
        log_key = ""
        if signed is not None:
            case = _case(found, signed.message)
            _check_draws(report, found, signed, trust)
            _check_decision(report, found, case, signed.message)
            log_key = _check_log(report, found, signed, trust)
    except LumarisError as error:
        name = CHECKS[len(report.checks)]
        report.checks.append(Check(name, holds=False, detail=f"{error.code}: {error.message}"))
        return report
    if signed is None:
        report.checks.append(Check("ruling", holds=False, detail="there is no ruling yet"))
        report.verdict = "unknown"
        return report
    known = trust.counts(signed, log_key)
    detail = "is trusted" if known else "is not trusted here"
    report.checks.append(Check("trust", known, f"the coordinator key {detail}"))
    report.verdict = "valid" if known else "unknown"
    return report


@dataclass(frozen=True)
class _Trust:
    """Whom the reader believes."""

    trusted: frozenset[str]
    listed: KeyList | None

    @property
    def keys(self) -> frozenset[str]:
        """Every key that may have signed a head of the log."""
        if self.listed is None:
            return self.trusted
        return frozenset(key.peer for key in self.listed.keys)

    def stands_for(self, signer: str, named: str) -> bool:
        """Whether a key signs for the coordinator that a document names."""
        return key_list.stands_for(self.listed, signer, named)

    def counts(self, signed: Signed[Ruling], log_key: str) -> bool:
        """Whether a ruling, and the key of its place in the log, are the coordinator's."""
        if self.listed is None:
            return signed.signer in self.trusted
        at = key_list.valid(self.listed, now=signed.message.issued_at)
        return signed.signer in at and log_key in key_list.never_revoked(self.listed)


def _open(report: Report, file: DisputeFile, trust: _Trust) -> _Opened:
    _note(report, "form", "a dispute file of format lumaris-dispute/1")
    opened = codec.open_signed(file.opened, DisputeOpen, network=file.network)
    message = opened.message
    if opened.signer != message.opener:
        raise RefusedError("wrong_signer", "The opening is not signed by its opener.")
    rulings.check_frame(opened)
    _note(report, "opening", f"{message.claim} by {message.opener}")
    contract = agreements.join(
        message.agreement_by_buyer, message.agreement_by_seller, network=file.network
    )
    rulings.check_opening(message, contract)
    grantor = envelope.decode(message.grant).signer
    if not trust.stands_for(grantor, contract.agreement.coordinator):
        raise RefusedError("wrong_signer", "The grant is not by the agreement's coordinator.")
    agreements.open_grant(
        message.grant, contract, network=file.network, coordinator=grantor, now=None
    )
    _note(report, "agreement", f"{contract.hash}, held by its coordinator")
    dossier = Dossier(contract, network=file.network)
    dossier.add(message.evidence, party=message.opener)
    price = rulings.price_of(dossier.main, message)
    done, parties = _add_bundles(file, opened, contract, dossier)
    _note(report, "evidence", f"{len(file.evidence) + 1} bundles, every document verified")
    answered = bool(parties - {message.opener})
    return _Opened(file, opened, contract, dossier, done, answered, price)


def _add_bundles(
    file: DisputeFile, opened: Signed[DisputeOpen], contract: Contract, dossier: Dossier
) -> tuple[frozenset[str], set[str]]:
    """Open the bundles; who said it was done, and who showed something."""
    counts: dict[str, int] = {}
    done = set()
    for data in file.evidence:
        bundle = codec.open_signed(data, DisputeEvidence, network=file.network)
        check_bundle(bundle, opened.message, contract, n=counts.get(bundle.signer, 0))
        dossier.add(bundle.message.evidence, party=bundle.signer)
        counts[bundle.signer] = counts.get(bundle.signer, 0) + 1
        if bundle.message.done:
            done.add(str(bundle.signer))
    return frozenset(done), set(counts)


def check_bundle(
    bundle: Signed[DisputeEvidence], opened: DisputeOpen, contract: Contract, *, n: int
) -> None:
    """A bundle is a party's next one in this dispute. Raises RefusedError."""
    message, agreement = bundle.message, contract.agreement
    rulings.check_frame(bundle)
    if bundle.signer != message.party or message.party not in (agreement.buyer, agreement.seller):
        raise RefusedError("wrong_signer", "Evidence comes from the dispute's parties.")
    if message.dispute != opened.dispute or message.agreement_hash != contract.hash:
        raise RefusedError("evidence_foreign", "The bundle belongs to another dispute.")
    if message.n != n:
        raise RefusedError("out_of_sequence", f"The party's next bundle has the number {n}.")


def _open_ruling(report: Report, found: _Opened, trust: _Trust) -> Signed[Ruling] | None:
    entry = found.file.ruling
    if entry is None:
        return None
    signed = codec.open_signed(entry.ruling, Ruling, network=found.file.network)
    report.ruling, report.coordinator = signed.message, signed.signer
    message, opened, agreement = signed.message, found.opened.message, found.contract.agreement
    if not trust.stands_for(signed.signer, agreement.coordinator):
        raise RefusedError("wrong_signer", "The ruling is not by the agreement's coordinator.")
    said = (message.dispute, message.agreement_hash, message.claim, message.order, message.opener)
    is_ = (opened.dispute, found.contract.hash, opened.claim, opened.order, opened.opener)
    parties = (message.buyer, message.seller, message.currency)
    if said != is_ or parties != (agreement.buyer, agreement.seller, agreement.terms.currency):
        raise RefusedError("dispute_invalid", "The ruling is about something else.")
    root = rulings.evidence_root(found.file.opened, found.file.evidence)
    if message.evidence_root != root or message.documents != len(found.file.evidence) + 1:
        raise RefusedError("dispute_invalid", "The ruling was made on other evidence.")
    _note(report, "ruling", f"signed by coordinator {signed.signer} on exactly this evidence")
    return signed


def _check_draws(report: Report, found: _Opened, signed: Signed[Ruling], trust: _Trust) -> None:
    """Every checker was drawn from a list that was logged before the chance of it was known."""
    drawn = list[str]()
    for round_, entry in enumerate(found.file.draws):
        drawn.append(_draw_again(found, entry, signed.signer, trust, drawn, round_=round_))
    if tuple(drawn) != signed.message.facts.checkers:
        raise RefusedError("dispute_invalid", "The ruling names other checkers than were drawn.")
    _note(report, "draws", f"{len(drawn)} drawn, each repeated from its checkpoint")


def _draw_again(
    found: _Opened,
    entry: DrawEntry,
    signer: str,
    trust: _Trust,
    drawn: list[str],
    *,
    round_: int,
) -> str:
    """The checker of one draw. Raises EnvelopeError or RefusedError."""
    network, agreement = found.file.network, found.contract.agreement
    drawing = codec.open_signed(entry.draw, CheckerDraw, network=network)
    listed = codec.open_signed(entry.candidates, CheckerList, network=network)
    if not all(trust.stands_for(one, signer) for one in (drawing.signer, listed.signer)):
        raise RefusedError("wrong_signer", "A draw is not by the coordinator of the ruling.")
    draw = drawing.message
    checkpoint, _ = _open_checkpoint(draw.checkpoint, network, signer, trust)
    rulings.check_candidates(listed.message.candidates, parties=(agreement.buyer, agreement.seller))
    falls_on = rulings.draw(
        listed.message.candidates,
        root=checkpoint.root,
        dispute=draw.dispute,
        round_=round_,
        drawn=drawn,
    )
    # Replicas are all drawn from one list; a checker in the place of a silent one has its own.
    first = 0 if agreement.verification == "repl" else round_
    name = found.opened.message.dispute
    if not (
        (draw.dispute, draw.round, draw.list_hash) == (name, round_, listed.hash)
        and (listed.message.dispute, listed.message.round) == (name, first)
        and falls_on == draw.checker
        and _included(entry.candidates, entry.salt, entry.proof, checkpoint)
    ):
        raise RefusedError("dispute_invalid", f"Draw {round_} does not follow from its list.")
    return falls_on


def _case(found: _Opened, ruling: Ruling) -> Case:
    return Case(found.contract, found.opened.message, found.dossier, ruling.facts)


def _check_decision(report: Report, found: _Opened, case: Case, ruling: Ruling) -> None:
    facts, opened = ruling.facts, found.opened.message
    if facts.bond_nanos != rulings.opener_bond(opened.amount_nanos):
        raise RefusedError("dispute_invalid", "The opener's bond is not the one that is due.")
    # What came in later may say of the order what the opening did not.
    price = max(found.price_nanos, rulings.price_of(case.session, opened))
    staked_max = rulings.stake_max(opened, case.agreement, refundable=facts.paid_nanos, price=price)
    if facts.stake_nanos > staked_max:
        raise RefusedError("dispute_invalid", "More was at stake than can be lost.")
    if facts.ends_at < case.agreement.ends_at or facts.claimed_nanos > facts.paid_nanos:
        raise RefusedError("dispute_invalid", "What the ruling states of the agreement is untrue.")
    if not _ended_so(found, case, ruling):
        raise RefusedError("dispute_invalid", "The dispute had not ended in the way it says.")
    expected = _decision(found, case, ruling)
    said = (
        ruling.fault,
        ruling.rule,
        ruling.award_nanos,
        ruling.refund_nanos,
        ruling.slash_nanos,
        ruling.collected_nanos,
        ruling.victim_nanos,
        ruling.bond_returned,
    )
    if said != fields_of(expected):
        raise RefusedError(
            "dispute_invalid", f"From this evidence follows {expected.rule}, not {ruling.rule}."
        )
    _note(report, "decision", f"{ruling.rule}: {ruling.fault} at fault, as the rules say")


def fields_of(decision: Decision) -> tuple[object, ...]:
    """A decision's fields that stand in its ruling, in their order."""
    return (
        decision.fault,
        decision.rule,
        decision.award_nanos,
        decision.refund_nanos,
        decision.slash_nanos,
        decision.collected_nanos,
        decision.victim_nanos,
        decision.bond_returned,
    )


def _ended_so(found: _Opened, case: Case, ruling: Ruling) -> bool:
    facts = ruling.facts
    if facts.ended == "evidence":
        return rulings.proven(case)
    if facts.ended == "done":
        done = found.done == {case.agreement.buyer, case.agreement.seller}
        return done and not rulings.check_due(case)
    if facts.ended == "deadline":
        return ruling.issued_at > facts.evidence_until >= facts.opened_at
    return bool(found.file.agreed)


def _decision(found: _Opened, case: Case, ruling: Ruling) -> Decision:
    if ruling.facts.ended != "agreed":
        return rulings.rule(case)
    if len(found.file.agreed) == 1:
        withdraw = codec.open_signed(
            found.file.agreed[0],
            DisputeWithdraw,
            network=found.file.network,
            signer=case.opened.opener,
        ).message
        if withdraw.dispute != ruling.dispute or withdraw.agreement_hash != case.contract.hash:
            raise RefusedError("dispute_invalid", "The withdrawal is another dispute's.")
        return rulings.withdrawn(case, answered=found.answered)
    split = open_split(found.file.agreed, case, network=found.file.network)
    return rulings.split(case, award_nanos=split.award_nanos, refund_nanos=split.refund_nanos)


def open_split(copies: tuple[bytes, ...], case: Case, *, network: str) -> DisputeSplit:
    """The split that both parties signed over the same payload. Raises EnvelopeError or
    RefusedError."""
    opened = [codec.open_signed(data, DisputeSplit, network=network) for data in copies]
    signers = {str(signed.signer) for signed in opened}
    payloads = {envelope.decode(data).payload for data in copies}
    message = opened[0].message
    if (
        signers != {case.agreement.buyer, case.agreement.seller}
        or len(payloads) != 1
        or message.dispute != case.opened.dispute
        or message.agreement_hash != case.contract.hash
    ):
        raise RefusedError("dispute_invalid", "The split is not one that both parties signed.")
    return message


def _check_log(report: Report, found: _Opened, signed: Signed[Ruling], trust: _Trust) -> str:
    """The ruling is in the log; the key that signed the checkpoint."""
    entry = found.file.ruling
    assert entry is not None
    checkpoint, key = _open_checkpoint(entry.checkpoint, found.file.network, signed.signer, trust)
    if not _included(entry.ruling, entry.salt, entry.proof, checkpoint):
        raise RefusedError("dispute_invalid", "The ruling is not in the log of its checkpoint.")
    _note(report, "log", f"leaf {entry.proof.index} of {entry.proof.size} in {checkpoint.origin}")
    return key


def _open_checkpoint(
    note: str, network: str, signer: str, trust: _Trust
) -> tuple[merkle.Checkpoint, str]:
    """A checkpoint, and the key that signed it. Raises EnvelopeError or RefusedError."""
    refusal = EnvelopeError("bad_signature")
    for key in (*sorted(trust.keys - {signer}), signer):
        try:
            checkpoint = merkle.open_checkpoint(note, keys.public_key_of(key))
        except EnvelopeError as error:
            refusal = error
            continue
        if checkpoint.origin != notes.log_origin(network):
            raise RefusedError("dispute_invalid", "The checkpoint is of another network's log.")
        return checkpoint, key
    raise refusal


def _included(document: bytes, salt: bytes, proof: LogProof, checkpoint: merkle.Checkpoint) -> bool:
    return proof.size == checkpoint.size and merkle.verify_inclusion(
        leaf=merkle.leaf_hash(merkle.commitment(salt, document)),
        index=proof.index,
        size=proof.size,
        path=[bytes.fromhex(name.removeprefix("sha256:")) for name in proof.hashes],
        root=checkpoint.root,
    )


def _note(report: Report, name: str, detail: str) -> None:
    report.checks.append(Check(name, holds=True, detail=detail))
