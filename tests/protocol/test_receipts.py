"""A receipt file proves what it says, or says what is wrong with it."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_protocol import codec, merkle, notes, receipts
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.notice import KeyList, SigningKey
from lumaris_protocol.messages.receipt import LogProof, ReceiptBundle
from tests import independent_log
from tests.protocol import parties as p

TRUSTED = frozenset({p.COORDINATOR.peer_id})
DONE = p.settled()
DATA = receipts.encode_bundle(DONE.bundle)
ORIGIN = notes.log_origin(p.NETWORK)


def verdict(data: bytes) -> tuple[str, str]:
    """The verdict and the first check that does not hold."""
    report = receipts.verify_bundle(data, trusted=TRUSTED)
    failed = [check.name for check in report.checks if not check.holds]
    return report.verdict, failed[0] if failed else ""


def changed(**changes: Any) -> bytes:
    return receipts.encode_bundle(msgspec.structs.replace(DONE.bundle, **changes))


def resigned(**changes: Any) -> bytes:
    """The coordinator signs another receipt and logs it properly."""
    text = msgspec.structs.replace(DONE.receipt.message, **changes)
    data = codec.sign(text, p.COORDINATOR, p.NETWORK).data
    tree = merkle.Tree([merkle.leaf_hash(merkle.commitment(p.SALT, data))])
    point = merkle.Checkpoint(ORIGIN, 1, tree.root())
    return changed(
        receipt=data,
        proof=LogProof(index=0, size=1, hashes=()),
        checkpoint=merkle.sign_checkpoint(point, p.COORDINATOR),
    )


@pytest.mark.parametrize("paid", [0, 1, 123_457, p.TERMS.cap_nanos])
@pytest.mark.parametrize(("leaves", "index"), [(1, 0), (5, 3), (64, 63)])
def test_a_true_receipt_is_valid(paid: int, leaves: int, index: int) -> None:
    data = receipts.encode_bundle(p.settled(paid, leaves=leaves, index=index).bundle)
    report = receipts.verify_bundle(data, trusted=TRUSTED)
    assert report.verdict == "valid"
    assert tuple(check.name for check in report.checks) == receipts.CHECKS
    assert all(check.holds and check.detail for check in report.checks)
    assert report.receipt is not None
    assert report.receipt.paid_nanos == paid
    assert report.coordinator == p.COORDINATOR.peer_id


def test_without_a_trusted_key_the_answer_is_unknown() -> None:
    for trusted in (frozenset[str](), frozenset({p.STRANGER.peer_id})):
        report = receipts.verify_bundle(DATA, trusted=trusted)
        assert report.verdict == "unknown"
        assert [check.name for check in report.checks if not check.holds] == ["trust"]


def test_the_file_is_readable_and_goes_round() -> None:
    assert receipts.decode_bundle(DATA) == DONE.bundle
    assert json.loads(DATA)["format"] == "lumaris-receipt/1"
    assert DATA.count(b"\n") > 5


DOCUMENTS = ["receipt", "agreement_by_buyer", "agreement_by_seller", "grant", "voucher"]


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("part", range(40))
def test_a_changed_byte_of_any_document_is_noticed(name: str, part: int) -> None:
    """Forty places over each document: key, type, payload and signature are all among them."""
    data = bytearray(getattr(DONE.bundle, name))
    data[len(data) * part // 40] ^= 1
    assert verdict(changed(**{name: bytes(data)}))[0] == "invalid"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_truncated_or_absent_document_is_noticed(name: str) -> None:
    assert verdict(changed(**{name: getattr(DONE.bundle, name)[:-1]}))[0] == "invalid"
    assert verdict(changed(**{name: b""}))[0] == "invalid"


OTHER = p.contract(name="2")


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"network": "othernet"}, "receipt"),
        ({"network": "a/b"}, "form"),
        ({"network": ""}, "form"),
        ({"format": "lumaris-receipt/2"}, "form"),
        ({"receipt": p.grant(DONE.contract).data}, "receipt"),
        ({"agreement_by_buyer": DONE.bundle.agreement_by_seller}, "agreement"),
        ({"agreement_by_buyer": OTHER.by_buyer}, "agreement"),
        (
            {"agreement_by_buyer": OTHER.by_buyer, "agreement_by_seller": OTHER.by_seller},
            "agreement",
        ),
        ({"grant": p.grant(OTHER).data}, "grant"),
        ({"grant": p.grant(DONE.contract, cap_nanos=p.TERMS.cap_nanos + 1).data}, "grant"),
        ({"grant": p.grant(DONE.contract, key=p.SELLER).data}, "grant"),
        ({"voucher": None}, "voucher"),
        ({"voucher": p.voucher(DONE.contract, 123_456).data}, "voucher"),
        ({"voucher": p.voucher(DONE.contract, 123_457, seq=9).data}, "voucher"),
        ({"voucher": p.voucher(OTHER, 123_457).data}, "voucher"),
        ({"proof": LogProof(index=2, size=5, hashes=DONE.bundle.proof.hashes)}, "log"),
        ({"proof": LogProof(index=3, size=6, hashes=DONE.bundle.proof.hashes)}, "log"),
        ({"proof": LogProof(index=3, size=5, hashes=DONE.bundle.proof.hashes[:-1])}, "log"),
        ({"proof": LogProof(index=3, size=5, hashes=())}, "log"),
        ({"salt": bytes(32)}, "log"),
        ({"salt": b""}, "form"),
        ({"checkpoint": ""}, "log"),
        ({"checkpoint": DONE.bundle.checkpoint.replace("\n5\n", "\n6\n")}, "log"),
    ],
)
def test_each_part_has_its_check(changes: dict[str, Any], check: str) -> None:
    assert verdict(changed(**changes)) == ("invalid", check)


def test_a_checkpoint_of_another_key_is_no_proof() -> None:
    tree = merkle.Tree([merkle.leaf_hash(merkle.commitment(p.SALT, DONE.bundle.receipt))])
    point = merkle.Checkpoint(ORIGIN, 1, tree.root())
    proof = LogProof(index=0, size=1, hashes=())
    forged = changed(proof=proof, checkpoint=merkle.sign_checkpoint(point, p.STRANGER))
    assert verdict(forged) == ("invalid", "log")
    fine = changed(proof=proof, checkpoint=merkle.sign_checkpoint(point, p.COORDINATOR))
    assert verdict(fine) == ("valid", "")


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"fee_nanos": 0}, "amounts"),
        ({"seller_nanos": 1}, "amounts"),
        ({"refund_nanos": 1}, "amounts"),
        ({"fee_bps": 0}, "amounts"),
        ({"buyer": p.STRANGER.peer_id}, "amounts"),
        ({"seller": p.STRANGER.peer_id}, "amounts"),
        ({"currency": "EUR"}, "amounts"),
        ({"session": OTHER.agreement.session}, "amounts"),
        ({"receipt": p.id_of("receipt", "x")}, "amounts"),
        ({"guarantees": ("Everything.",)}, "amounts"),
        ({"not_guaranteed": ()}, "amounts"),
        ({"verification": "evid"}, "amounts"),
        ({"paid_nanos": 1}, "voucher"),
        ({"voucher_hash": None}, "voucher"),
        ({"cap_nanos": 1}, "grant"),
        ({"agreement_hash": p.digest_of("x")}, "agreement"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_coordinator_that_lies_is_caught(changes: dict[str, Any], check: str) -> None:
    """Signed and logged, but not what follows from the documents of buyer and seller."""
    assert verdict(resigned(**changes)) == ("invalid", check)


def test_another_coordinator_cannot_settle_this_agreement() -> None:
    data = codec.sign(DONE.receipt.message, p.STRANGER, p.NETWORK).data
    assert verdict(changed(receipt=data)) == ("invalid", "agreement")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        DATA[:-10],
        DATA.replace(b'"grant"', b'"x"'),
    ],
)
def test_junk_is_invalid_and_never_raises(data: bytes) -> None:
    assert verdict(data) == ("invalid", "form")


def test_a_huge_file_is_not_read() -> None:
    data = b" " * (receipts.BUNDLE_BYTES_MAX + 1)
    assert verdict(data) == ("invalid", "form")
    with pytest.raises(RefusedError, match="oversize"):
        receipts.decode_bundle(data)


def test_the_largest_honest_bundle_fits() -> None:
    assert len(DATA) * 10 < receipts.BUNDLE_BYTES_MAX
    assert set(ReceiptBundle.__struct_fields__) >= set(DOCUMENTS)


# --- the second checker ---


def other_holds(data: bytes) -> bool:
    try:
        independent_log.check_file(data, coordinator=p.COORDINATOR.peer_id)
    except independent_log.Wrong:
        return False
    return True


@pytest.mark.parametrize("paid", [0, 1, 123_457])
@pytest.mark.parametrize(("leaves", "index"), [(1, 0), (5, 4), (7, 3), (64, 63)])
def test_a_second_implementation_finds_it_valid(paid: int, leaves: int, index: int) -> None:
    settled = p.settled(paid, leaves=leaves, index=index)
    data = receipts.encode_bundle(settled.bundle)
    receipt, cosigned = independent_log.check_file(data, coordinator=p.COORDINATOR.peer_id)
    assert receipt["paid_nanos"] == paid
    assert cosigned == {}
    with pytest.raises(independent_log.Wrong):
        independent_log.check_file(data, coordinator=p.STRANGER.peer_id)


SIGNED = ("receipt", "agreement_by_buyer", "agreement_by_seller", "grant", "voucher", "salt")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIGNED), st.integers(0, 10_000), st.integers(0, 7))
def test_both_refuse_any_flipped_bit(name: str, place: int, bit: int) -> None:
    data = bytearray(getattr(DONE.bundle, name))
    data[place % len(data)] ^= 1 << bit
    bad = changed(**{name: bytes(data)})
    assert verdict(bad)[0] == "invalid"
    assert not other_holds(bad)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2), st.integers(0, 255), st.integers(0, 7))
def test_both_refuse_a_flipped_bit_of_the_proof(which: int, place: int, bit: int) -> None:
    hashes = [bytearray.fromhex(name[7:]) for name in DONE.bundle.proof.hashes]
    hashes[which % len(hashes)][place % 32] ^= 1 << bit
    names = tuple(f"sha256:{node.hex()}" for node in hashes)
    bad = changed(proof=msgspec.structs.replace(DONE.bundle.proof, hashes=names))
    assert verdict(bad) == ("invalid", "log")
    assert not other_holds(bad)


@pytest.mark.parametrize("position", range(0, len(DONE.bundle.checkpoint), 3))
def test_both_refuse_a_changed_checkpoint(position: int) -> None:
    note = DONE.bundle.checkpoint
    if position == len(note) - 1:
        return
    bad = changed(
        checkpoint=note[:position] + ("A" if note[position] != "A" else "B") + note[position + 1 :]
    )
    assert verdict(bad) == ("invalid", "log")
    assert not other_holds(bad)


def test_the_log_of_another_network_is_no_proof() -> None:
    tree = merkle.Tree([merkle.leaf_hash(merkle.commitment(p.SALT, DONE.bundle.receipt))])
    point = merkle.Checkpoint(notes.log_origin("othernet"), 1, tree.root())
    bad = changed(
        proof=LogProof(index=0, size=1, hashes=()),
        checkpoint=merkle.sign_checkpoint(point, p.COORDINATOR),
    )
    assert verdict(bad) == ("invalid", "log")
    assert not other_holds(bad)


def test_the_proof_in_the_form_of_other_tools() -> None:
    """C2SP tlog-proof, read by its text."""
    text = receipts.tlog_proof(DONE.bundle)
    head, _, note = text.partition("\n\n")
    first, extra, index, *path = head.split("\n")
    assert first == "c2sp.org/tlog-proof@v1"
    salt = base64.b64decode(extra.removeprefix("extra "))
    leaf = independent_log.leaf_hash(hashlib.sha256(salt + DONE.bundle.receipt).digest())
    size, root = independent_log.open_head(note, ORIGIN, p.COORDINATOR.public_key)
    hashes = [base64.b64decode(line) for line in path]
    place = int(index.removeprefix("index "))
    assert independent_log.root_from_path(leaf, place, size, hashes) == root


# --- after a key was revoked ---

ROOT, NEW = p.key_of("root"), p.key_of("new coordinator key")


def listed(at: int) -> KeyList:
    """The first key was revoked soon after a receipt of that time."""
    old = SigningKey(
        peer=p.COORDINATOR.peer_id, not_before=0, not_after=at + 10**6, revoked_at=at + 100
    )
    new = SigningKey(peer=NEW.peer_id, not_before=at, not_after=at + 10**7)
    return KeyList(root=ROOT.peer_id, seq=3, issued_at=at + 10_000, keys=(old, new))


def filed(bundle: ReceiptBundle, receipt: bytes, log_key: KeyPair) -> bytes:
    """The bundle with this receipt in a log of one leaf under that key."""
    root = merkle.leaf_hash(merkle.commitment(p.SALT, receipt))
    point = merkle.Checkpoint(notes.log_origin(p.NETWORK), 1, root)
    changed = msgspec.structs.replace(
        bundle,
        receipt=receipt,
        proof=LogProof(index=0, size=1, hashes=()),
        checkpoint=merkle.sign_checkpoint(point, log_key),
    )
    return receipts.encode_bundle(changed)


def test_what_a_thief_dates_back_is_not_believed() -> None:
    done = p.settled()
    message = done.receipt.message
    data = codec.sign(message, p.COORDINATOR, p.NETWORK).data
    keys = listed(message.issued_at)
    forged = receipts.verify_bundle(
        filed(done.bundle, data, p.COORDINATOR), trusted=frozenset(), key_list=keys
    )
    assert forged.verdict == "unknown"
    assert "fetch the receipt file again" in forged.checks[-1].detail
    # In the log that goes on under the new key it is an honest one.
    honest = receipts.verify_bundle(
        filed(done.bundle, data, NEW), trusted=frozenset(), key_list=keys
    )
    assert honest.verdict == "valid", honest
    stranger = receipts.verify_bundle(
        filed(done.bundle, data, ROOT), trusted=frozenset(), key_list=keys
    )
    assert stranger.verdict == "invalid"


def test_another_key_of_the_list_ends_what_a_revoked_one_began() -> None:
    done = p.settled()
    at = done.receipt.message.issued_at
    message = msgspec.structs.replace(done.receipt.message, issued_at=at + 200)
    file = filed(done.bundle, codec.sign(message, NEW, p.NETWORK).data, NEW)
    report = receipts.verify_bundle(file, trusted=frozenset(), key_list=listed(at))
    assert report.verdict == "valid", report
    assert report.coordinator == NEW.peer_id
    # Two keys that are trusted apart may be two coordinators.
    both = frozenset({p.COORDINATOR.peer_id, NEW.peer_id})
    assert receipts.verify_bundle(file, trusted=both).verdict == "invalid"
