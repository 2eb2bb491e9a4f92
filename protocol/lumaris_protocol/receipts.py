"""Verifying a receipt file without asking anyone.

Three answers: `valid` (every check holds under a trusted coordinator key), `invalid` (a check
fails), `unknown` (all signatures hold together, but none of the trusted keys made them, or too few
of the witnesses that a policy asks for were there).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from lumaris_protocol import (
    agreements,
    codec,
    envelope,
    keys,
    log_policy,
    merkle,
    notes,
    settlement,
)
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.key_list import never_revoked, stands_for
from lumaris_protocol.key_list import valid as valid_keys
from lumaris_protocol.limits import MIB
from lumaris_protocol.log_policy import LogPolicy, Standing
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.messages.dispute import Ruling
from lumaris_protocol.messages.notice import KeyList
from lumaris_protocol.messages.receipt import Receipt, ReceiptBundle
from lumaris_protocol.notes import NoteKey

Verdict = Literal["valid", "invalid", "unknown"]

BUNDLE_BYTES_MAX = MIB  # a bundle is a few documents of at most 64 KiB, base64 in JSON
CHECKS = ("form", "receipt", "agreement", "grant", "voucher", "amounts", "log", "trust")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    holds: bool
    detail: str


@dataclass
class Report:
    """What was checked and what it comes to."""

    verdict: Verdict = "invalid"
    checks: list[Check] = field(default_factory=list)
    receipt: Receipt | None = None
    coordinator: str = ""


def encode_bundle(bundle: ReceiptBundle) -> bytes:
    """The bytes of a receipt file."""
    return msgspec.json.format(msgspec.json.encode(bundle), indent=2)


def decode_bundle(data: bytes) -> ReceiptBundle:
    """A receipt file's content. Raises RefusedError `oversize` or `malformed`."""
    if len(data) > BUNDLE_BYTES_MAX:
        raise RefusedError("oversize", "The receipt file is too large.")
    try:
        return msgspec.json.decode(data, type=ReceiptBundle)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("malformed", f"Not a receipt file: {error}") from None


def tlog_proof(bundle: ReceiptBundle) -> str:
    """The receipt's place in the log as a C2SP tlog-proof, for any tool that reads those: the leaf
    is the SHA-256 of the salt (its extra data) and the receipt."""
    hashes = (bytes.fromhex(name.removeprefix("sha256:")) for name in bundle.proof.hashes)
    lines = [
        "c2sp.org/tlog-proof@v1",
        f"extra {base64.b64encode(bundle.salt).decode()}",
        f"index {bundle.proof.index}",
        *(base64.b64encode(node).decode() for node in hashes),
    ]
    return "\n".join(lines) + f"\n\n{bundle.checkpoint}"


def verify_bundle(
    data: bytes,
    *,
    trusted: frozenset[str],
    policy: LogPolicy | None = None,
    key_list: KeyList | None = None,
) -> Report:
    """Check a receipt file against the coordinator peer ids in `trusted`. Never raises.

    The log keys of a `policy` are trusted too, and its quorum is asked for. With a `key_list`,
    which the caller has checked, a key counts for receipts of its time, any other of the list may
    have signed in its place, and the log's head must be under a key that was never revoked: what a
    thief dates back with a stolen key is in no log but its own.
    """
    report = Report()
    anchors = _Anchors(trusted, policy, key_list)
    try:
        bundle = decode_bundle(data)
        _note(report, "form", "a receipt file of format lumaris-receipt/1")
        receipt = codec.open_signed(bundle.receipt, Receipt, network=bundle.network)
        report.receipt, report.coordinator = receipt.message, receipt.signer
        _note(report, "receipt", f"signed by coordinator {receipt.signer}")
        contract = _check_agreement(report, bundle, receipt, anchors)
        _check_amounts(report, bundle, receipt, contract, anchors)
        log_key = _check_log(report, bundle, receipt, anchors)
        standing = log_policy.check(policy, bundle.checkpoint) if policy is not None else None
    except LumarisError as error:
        name = CHECKS[len(report.checks)]
        report.checks.append(Check(name, holds=False, detail=f"{error.code}: {error.message}"))
        return report
    known = anchors.trusts(receipt.signer, at=receipt.message.issued_at)
    known = known and anchors.trusts_log(log_key, standing)
    detail = (
        "the coordinator key is trusted" if known else "the coordinator key is not trusted here"
    )
    if key_list is not None and log_key not in never_revoked(key_list):
        detail = "the log's head is under no key that counts: fetch the receipt file again"
    report.checks.append(Check("trust", known, detail))
    if standing is not None:
        names = ", ".join(standing.witnesses).encode(errors="replace").decode() or "none"
        report.checks.append(Check("witnesses", standing.enough, f"of the policy's: {names}"))
    report.verdict = "valid" if all(check.holds for check in report.checks) else "unknown"
    return report


@dataclass(frozen=True)
class _Anchors:
    """Whom the verifier believes."""

    trusted: frozenset[str]
    policy: LogPolicy | None
    key_list: KeyList | None

    @property
    def coordinators(self) -> frozenset[str]:
        """Every key that may be a coordinator's, at some time."""
        found = self.trusted | {keys.peer_id_of(key.public_key) for key in self._logs}
        listed = self.key_list.keys if self.key_list is not None else ()
        return found | {key.peer for key in listed}

    @property
    def _logs(self) -> list[NoteKey]:
        return self.policy.logs if self.policy is not None else []

    def trusts(self, signer: str, *, at: int) -> bool:
        """Whether a key counts for a receipt of that time."""
        if self.key_list is not None:
            return signer in valid_keys(self.key_list, now=at)
        return signer in self.coordinators

    def trusts_log(self, signer: str, standing: Standing | None) -> bool:
        """Whether a key counts for the log, now: a policy that lists logs decides alone."""
        if self._logs:
            return standing is not None and standing.log is not None
        if self.key_list is not None:
            return signer in never_revoked(self.key_list)
        return signer in self.coordinators

    def stands_for(self, signer: str, named: str) -> bool:
        """Whether a key signs for the coordinator that a document names: it is that key, or another
        one of the same list."""
        return stands_for(self.key_list, signer, named)


def _check_agreement(
    report: Report, bundle: ReceiptBundle, receipt: Signed[Receipt], anchors: _Anchors
) -> Contract:
    contract = agreements.join(
        bundle.agreement_by_buyer, bundle.agreement_by_seller, network=bundle.network
    )
    named = contract.agreement.coordinator
    by_coordinator = anchors.stands_for(receipt.signer, named)
    if contract.hash != receipt.message.agreement_hash or not by_coordinator:
        raise RefusedError("receipt_invalid", "The enclosed agreement is not the receipt's.")
    _note(
        report, "agreement", f"signed by {contract.agreement.buyer} and {contract.agreement.seller}"
    )
    grantor = envelope.decode(bundle.grant).signer
    if not anchors.stands_for(grantor, named):
        raise EnvelopeError("wrong_signer", "The grant is not by the agreement's coordinator.")
    grant = agreements.open_grant(
        bundle.grant, contract, network=bundle.network, coordinator=grantor, now=None
    )
    bounds = _amended(bundle, contract)
    if not (grant.message.cap_nanos == receipt.message.cap_nanos == bounds.cap_nanos):
        raise RefusedError("receipt_invalid", "The grant's cap is not the receipt's.")
    if grant.message.not_after != bounds.ends_at:
        raise RefusedError("receipt_invalid", "The grant's end is not the agreement's.")
    _note(report, "grant", f"serial {grant.message.serial} covers the agreement")
    return contract


def _amended(bundle: ReceiptBundle, contract: Contract) -> agreements.Bounds:
    """Follow the enclosed amendments, each with one or two copies, from the agreement."""
    bounds = agreements.bounds_of(contract)
    copies = list(bundle.amendments)
    while copies:
        by_buyer, by_seller = copies.pop(0), None
        if copies and envelope.decode(copies[0]).signer == contract.agreement.seller:
            by_seller = copies.pop(0)
        bounds = agreements.amend(contract, bounds, by_buyer, by_seller, network=bundle.network)
    return bounds


def _check_amounts(
    report: Report,
    bundle: ReceiptBundle,
    receipt: Signed[Receipt],
    contract: Contract,
    anchors: _Anchors,
) -> None:
    message = receipt.message
    vouchered, voucher_hash = 0, None
    if bundle.voucher is not None:
        voucher = settlement.open_voucher(
            bundle.voucher,
            contract.agreement,
            network=bundle.network,
            cap_nanos=message.cap_nanos,
        )
        vouchered, voucher_hash = voucher.message.total_nanos, voucher.hash
    least, most = _payable(bundle, receipt, contract, vouchered, anchors)
    if not least <= message.paid_nanos <= most or message.voucher_hash != voucher_hash:
        raise RefusedError("receipt_invalid", "The amount paid is not the buyer's voucher.")
    _note(report, "voucher", f"the buyer vouchered {vouchered} nanos")
    expected = settlement.make_receipt(
        contract,
        cap_nanos=message.cap_nanos,
        paid_nanos=min(message.paid_nanos, message.cap_nanos),
        voucher_hash=voucher_hash,
        outcome=message.outcome,
        now=message.issued_at,
    )
    if expected != message:
        raise RefusedError("receipt_invalid", "The receipt's amounts do not follow from its terms.")
    _note(
        report,
        "amounts",
        f"{message.seller_nanos} + {message.fee_nanos} + {message.refund_nanos} nanos",
    )


def _payable(
    bundle: ReceiptBundle,
    receipt: Signed[Receipt],
    contract: Contract,
    vouchered: int,
    anchors: _Anchors,
) -> tuple[int, int]:
    """The least and the most that may be paid: one amount, unless a ruling added to the voucher.

    A voucher that was shown after a ruling is paid only as far as it exceeds what was paid before,
    so the voucher is the least and the voucher with all awards is the most.
    """
    outcome = receipt.message.outcome
    if bool(bundle.closes) != (outcome == "closed") or bool(bundle.rulings) != (outcome == "ruled"):
        raise RefusedError("receipt_invalid", "The enclosed documents are another outcome's.")
    if outcome == "closed":
        closed = settlement.open_closes(bundle.closes, contract.agreement, network=bundle.network)
        if closed > vouchered:
            raise RefusedError("receipt_invalid", "More was paid than the buyer vouchered.")
        return closed, closed
    most, seen = vouchered, set()
    for data in bundle.rulings:
        signed = codec.open_signed(data, Ruling, network=bundle.network)
        if not anchors.stands_for(signed.signer, contract.agreement.coordinator):
            raise EnvelopeError("wrong_signer", "A ruling is not by the agreement's coordinator.")
        ruling = signed.message
        if ruling.agreement_hash != contract.hash or ruling.dispute in seen:
            raise RefusedError("receipt_invalid", "A ruling is another agreement's, or repeated.")
        seen.add(ruling.dispute)
        most += ruling.award_nanos
    return vouchered, most


def _check_log(
    report: Report, bundle: ReceiptBundle, receipt: Signed[Receipt], anchors: _Anchors
) -> str:
    """The receipt is in the log; the coordinator key that signed the checkpoint."""
    signers = sorted({receipt.signer} | anchors.coordinators)
    checkpoint, signer = _open_checkpoint(bundle, signers)
    if checkpoint.origin != notes.log_origin(bundle.network):
        raise RefusedError("receipt_invalid", "The checkpoint is of another network's log.")
    included = checkpoint.size == bundle.proof.size and merkle.verify_inclusion(
        leaf=merkle.leaf_hash(merkle.commitment(bundle.salt, bundle.receipt)),
        index=bundle.proof.index,
        size=bundle.proof.size,
        path=[bytes.fromhex(name.removeprefix("sha256:")) for name in bundle.proof.hashes],
        root=checkpoint.root,
    )
    if not included:
        raise RefusedError("receipt_invalid", "The receipt is not in the log of its checkpoint.")
    _note(report, "log", f"leaf {bundle.proof.index} of {bundle.proof.size} in {checkpoint.origin}")
    return signer


def _open_checkpoint(bundle: ReceiptBundle, signers: list[str]) -> tuple[Checkpoint, str]:
    refusal = EnvelopeError("bad_signature")
    for signer in signers:
        try:
            return merkle.open_checkpoint(bundle.checkpoint, keys.public_key_of(signer)), signer
        except EnvelopeError as error:
            refusal = error
        except ValueError:
            continue  # what the caller trusts is no peer id
    raise refusal


def _note(report: Report, name: str, detail: str) -> None:
    report.checks.append(Check(name, holds=True, detail=detail))
