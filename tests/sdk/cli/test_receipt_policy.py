"""`receipt verify` with a policy file, a key list, and several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lumaris_protocol import codec, notes, receipts
from lumaris_protocol.messages.notice import KeyList, SigningKey
from tests.protocol import parties as p
from tests.sdk.cli.command import ERROR_SHAPE, assert_one_message, call, json_of, shape_of

LOG = notes.log_key(p.NETWORK, p.COORDINATOR.public_key)
WITNESSES = {"one": p.BUYER, "two": p.SELLER}
KEYS = {name: notes.witness_key(p.NETWORK, key.peer_id) for name, key in WITNESSES.items()}
HEAD = f"log {LOG.vkey}\n" + "".join(f"witness {n} {k.vkey}\n" for n, k in KEYS.items())


def file(folder: Path, *witnesses: str, name: str = "receipt") -> Path:
    """A receipt file under a head that these witnesses cosigned."""
    bundle = p.settled().bundle
    text = bundle.checkpoint.partition("\n\n")[0] + "\n"
    lines = [
        notes.cosign(text, WITNESSES[one], name=KEYS[one].name, now=p.NOW) for one in witnesses
    ]
    found = msgspec.structs.replace(bundle, checkpoint=bundle.checkpoint + "".join(lines))
    path = folder / name
    path.write_bytes(receipts.encode_bundle(found))
    return path


def policy(folder: Path, rules: str) -> Path:
    path = folder / "policy"
    path.write_text(HEAD + rules)
    return path


@pytest.mark.parametrize(
    ("rules", "cosigned", "status", "verdict"),
    [
        ("quorum none", (), 0, "valid"),
        ("quorum one", (), 2, "unknown"),
        ("quorum one", ("one",), 0, "valid"),
        ("quorum one", ("two",), 2, "unknown"),
        ("group both all one two\nquorum both", ("two", "one"), 0, "valid"),
    ],
)
def test_a_quorum_decides(
    tmp_path: Path, rules: str, cosigned: tuple[str, ...], status: int, verdict: str
) -> None:
    found = call(
        "receipt",
        "verify",
        file(tmp_path, *cosigned),
        "--policy",
        policy(tmp_path, rules),
        "--json",
    )
    assert found.exit_code == status
    report = json_of(found)
    assert report["verdict"] == verdict
    names = [check["name"] for check in report["checks"]]
    assert names == [*receipts.CHECKS, "witnesses"]


def test_a_policy_decides_alone_whose_log_it_is(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(f"log {notes.log_key(p.NETWORK, p.STRANGER.public_key).vkey}\nquorum none\n")
    receipt = file(tmp_path)
    assert call("receipt", "verify", receipt, "--policy", other).exit_code == 2
    trusting = call(
        "receipt", "verify", receipt, "--policy", other, "--trust", p.COORDINATOR.peer_id
    )
    assert trusting.exit_code == 2
    assert "not under keys and witnesses trusted here" in trusting.stdout
    # Without logs, the keys trusted otherwise decide.
    (tmp_path / "free").write_text("quorum none\n")
    words = ("receipt", "verify", receipt, "--policy", tmp_path / "free")
    assert call(*words, state=tmp_path / "none").exit_code == 2
    assert call(*words, "--trust", p.COORDINATOR.peer_id).exit_code == 0


def test_a_bad_cosignature_of_a_known_witness_spoils_it(tmp_path: Path) -> None:
    receipt = file(tmp_path, "one")
    content = json.loads(receipt.read_text())
    bad = notes.line_of(notes.Line(KEYS["two"].name, KEYS["two"].id, bytes(72)))
    content["checkpoint"] += bad
    receipt.write_text(json.dumps(content))
    found = call("receipt", "verify", receipt, "--policy", policy(tmp_path, "quorum one"))
    assert found.exit_code == 1


def test_what_is_no_policy(tmp_path: Path) -> None:
    receipt = file(tmp_path)
    for path, code in ((tmp_path / "none", "not_found"), (receipt, "malformed")):
        found = call("receipt", "verify", receipt, "--policy", path)
        assert found.exit_code == 2
        assert_one_message(found.stderr, code)
    shown = call("receipt", "verify", receipt, "--policy", receipt, "--json")
    assert shape_of(json_of(shown)) == ERROR_SHAPE


# --- key lists ---


def key_list(folder: Path, root: Any = p.STRANGER, **window: int) -> Path:
    fields = {"not_before": p.NOW - 1_000, "not_after": p.NOW + 1_000} | window
    message = KeyList(
        root=root.peer_id,
        seq=3,
        keys=(
            SigningKey(peer=p.COORDINATOR.peer_id, **fields),
            SigningKey(peer=p.BUYER.peer_id, not_before=p.NOW, not_after=p.NOW + 9_000),
        ),
        issued_at=p.NOW,
    )
    path = folder / "keys"
    path.write_bytes(codec.sign(message, root, p.NETWORK).data)
    return path


@pytest.mark.parametrize(
    ("window", "status"),
    [
        ({}, 0),
        ({"not_after": p.NOW - 500}, 2),
        ({"not_before": p.NOW + 500}, 2),
        ({"revoked_at": p.NOW}, 2),
        ({"revoked_at": p.NOW + 5_000}, 2),
    ],
)
def test_a_key_counts_for_receipts_of_its_time(
    tmp_path: Path, window: dict[str, int], status: int
) -> None:
    """The receipt is of NOW + 100; its head by a key revoked at any time could be a thief's."""
    words = ("--key-list", key_list(tmp_path, **window), "--root", p.STRANGER.peer_id)
    assert call("receipt", "verify", file(tmp_path), *words).exit_code == status


def test_the_log_may_have_a_newer_key(tmp_path: Path) -> None:
    """After a rotation the head is signed by the next key of the list."""
    from lumaris_protocol import merkle

    receipt = file(tmp_path)
    bundle = receipts.decode_bundle(receipt.read_bytes())
    point = merkle.open_checkpoint(bundle.checkpoint, p.COORDINATOR.public_key)
    rotated = merkle.sign_checkpoint(point, p.BUYER)
    receipt.write_bytes(receipts.encode_bundle(msgspec.structs.replace(bundle, checkpoint=rotated)))
    words = ("--key-list", key_list(tmp_path), "--root", p.STRANGER.peer_id)
    assert call("receipt", "verify", receipt, *words).exit_code == 0
    assert call("receipt", "verify", receipt, "--trust", p.COORDINATOR.peer_id).exit_code == 1


def test_a_key_list_of_another_root_says_nothing(tmp_path: Path) -> None:
    receipt, listed = file(tmp_path), key_list(tmp_path)
    found = call("receipt", "verify", receipt, "--key-list", listed, "--root", p.SELLER.peer_id)
    assert found.exit_code == 2
    assert_one_message(found.stderr, "root_changed")
    for words in (("--key-list", listed), ("--root", p.SELLER.peer_id)):
        found = call("receipt", "verify", receipt, *words)
        assert found.exit_code == 2
        assert_one_message(found.stderr, "usage")


# --- several files ---


def test_the_worst_of_several_files_decides(tmp_path: Path) -> None:
    good = file(tmp_path, name="good")
    bad = tmp_path / "bad"
    bad.write_text("{}")
    trust = ("--trust", p.COORDINATOR.peer_id)
    for names, status in (
        ((good, good), 0),
        ((good, tmp_path / "none"), 2),
        ((tmp_path / "none", bad, good), 1),
    ):
        assert call("receipt", "verify", *names, *trust).exit_code == status
    shown = json_of(call("receipt", "verify", good, bad, tmp_path / "none", *trust, "--json"))
    assert shown["verdict"] == "invalid"
    assert [one["file"] for one in shown["receipts"]] == [
        str(path) for path in (good, bad, tmp_path / "none")
    ]
    assert [one.get("verdict") for one in shown["receipts"]] == ["valid", "invalid", None]
    assert shown["receipts"][2]["error"]["code"] == "not_found"
    text = call("receipt", "verify", good, bad, *trust).stdout
    assert f"{good}:" in text
    assert text.splitlines()[-1] == "invalid: do not rely on this receipt"


def test_the_proof_for_other_tools(tmp_path: Path) -> None:
    receipt, out = file(tmp_path, "one"), tmp_path / "out.tlog-proof"
    assert call("receipt", "show", receipt, "--proof", out).exit_code == 0
    bundle = receipts.decode_bundle(receipt.read_bytes())
    assert out.read_text() == receipts.tlog_proof(bundle)
    found = call("receipt", "show", receipt, "--proof", "/dev/null/x")
    assert_one_message(found.stderr, "not_writable")


# --- getting it anew ---


def test_a_receipt_is_fetched_with_its_cosignatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt, later = file(tmp_path), file(tmp_path, "one", "two", name="later")
    identity, out = p.settled().receipt.message.receipt, tmp_path / "out"
    asked: list[str] = []

    def answer(_profile: object, name: str) -> bytes:
        asked.append(name)
        return later.read_bytes()

    monkeypatch.setattr("lumaris.cli.account.fetch_receipt", answer)
    for name in (receipt, identity):
        found = call("receipt", "fetch", name, "--out", out, "--json", state=tmp_path / "state")
        assert json_of(found) == {"receipt": identity, "log_size": 5, "cosignatures": 2}
        assert out.read_bytes() == later.read_bytes()
    assert asked == [identity, identity]
    both = policy(tmp_path, "group both all one two\nquorum both")
    assert call("receipt", "verify", receipt, "--policy", both).exit_code == 2
    assert call("receipt", "verify", out, "--policy", both).exit_code == 0
    assert "cosignatures  2" in call("receipt", "fetch", receipt, "--out", out).stdout


def test_another_receipt_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, out = file(tmp_path), tmp_path / "out"
    monkeypatch.setattr(
        "lumaris.cli.account.fetch_receipt", lambda _profile, _name: other.read_bytes()
    )
    found = call("receipt", "fetch", p.id_of("receipt", "x"), "--out", out, state=tmp_path / "s")
    assert_one_message(found.stderr, "receipt_invalid")
    assert not out.exists()
    for name in ("nothing", p.id_of("session", "x")):
        found = call("receipt", "fetch", name, "--out", out, state=tmp_path / "s")
        assert_one_message(found.stderr, "not_found")
