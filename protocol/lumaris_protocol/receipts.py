"""Verifying a receipt file without asking anyone.

Three answers: `valid` (every check holds under a trusted coordinator key), `invalid` (a check
fails), `unknown` (all signatures hold together, but none of the trusted keys made them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from lumaris_protocol import agreements, codec, keys, merkle, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.limits import MIB
from lumaris_protocol.messages.receipt import Receipt, ReceiptBundle

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


def verify_bundle(data: bytes, *, trusted: frozenset[str]) -> Report:
    """Check a receipt file against the coordinator peer ids in `trusted`. Never raises."""
    report = Report()
    try:
        bundle = decode_bundle(data)
        _note(report, "form", "a receipt file of format lumaris-receipt/1")
        receipt = codec.open_signed(bundle.receipt, Receipt, network=bundle.network)
        report.receipt, report.coordinator = receipt.message, receipt.signer
        _note(report, "receipt", f"signed by coordinator {receipt.signer}")
        contract = _check_agreement(report, bundle, receipt)
        _check_amounts(report, bundle, receipt, contract)
        _check_log(report, bundle, receipt)
    except LumarisError as error:
        name = CHECKS[len(report.checks)]
        report.checks.append(Check(name, holds=False, detail=f"{error.code}: {error.message}"))
        return report
    known = receipt.signer in trusted
    detail = (
        "the coordinator key is trusted" if known else "the coordinator key is not trusted here"
    )
    report.checks.append(Check("trust", known, detail))
    report.verdict = "valid" if known else "unknown"
    return report


def _check_agreement(report: Report, bundle: ReceiptBundle, receipt: Signed[Receipt]) -> Contract:
    contract = agreements.join(
        bundle.agreement_by_buyer, bundle.agreement_by_seller, network=bundle.network
    )
    if (
        contract.hash != receipt.message.agreement_hash
        or contract.agreement.coordinator != receipt.signer
    ):
        raise RefusedError("receipt_invalid", "The enclosed agreement is not the receipt's.")
    _note(
        report, "agreement", f"signed by {contract.agreement.buyer} and {contract.agreement.seller}"
    )
    grant = agreements.open_grant(
        bundle.grant, contract, network=bundle.network, coordinator=receipt.signer, now=None
    )
    if grant.message.cap_nanos != receipt.message.cap_nanos:
        raise RefusedError("receipt_invalid", "The grant's cap is not the receipt's.")
    _note(report, "grant", f"serial {grant.message.serial} covers the agreement")
    return contract


def _check_amounts(
    report: Report, bundle: ReceiptBundle, receipt: Signed[Receipt], contract: Contract
) -> None:
    vouchered, voucher_hash = 0, None
    if bundle.voucher is not None:
        voucher = settlement.open_voucher(
            bundle.voucher, contract.agreement, network=bundle.network
        )
        vouchered, voucher_hash = voucher.message.total_nanos, voucher.hash
    if receipt.message.paid_nanos != vouchered or receipt.message.voucher_hash != voucher_hash:
        raise RefusedError("receipt_invalid", "The amount paid is not the buyer's voucher.")
    _note(report, "voucher", f"the buyer vouchered {vouchered} nanos")
    message = receipt.message
    expected = settlement.make_receipt(
        contract,
        cap_nanos=message.cap_nanos,
        paid_nanos=min(vouchered, message.cap_nanos),
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


def _check_log(report: Report, bundle: ReceiptBundle, receipt: Signed[Receipt]) -> None:
    checkpoint = merkle.open_checkpoint(bundle.checkpoint, keys.public_key_of(receipt.signer))
    included = checkpoint.size == bundle.proof.size and merkle.verify_inclusion(
        leaf=merkle.leaf_hash(bundle.receipt),
        index=bundle.proof.index,
        size=bundle.proof.size,
        path=[bytes.fromhex(name.removeprefix("sha256:")) for name in bundle.proof.hashes],
        root=checkpoint.root,
    )
    if not included:
        raise RefusedError("receipt_invalid", "The receipt is not in the log of its checkpoint.")
    _note(report, "log", f"leaf {bundle.proof.index} of {bundle.proof.size} in {checkpoint.origin}")


def _note(report: Report, name: str, detail: str) -> None:
    report.checks.append(Check(name, holds=True, detail=detail))
