"""The golden bytes: unchanged since they were written down, and still true."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lumaris_protocol import codec, envelope, frames, keys, merkle, receipts
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.registry import MESSAGES
from tests.vectors import generate


def load(name: str) -> Any:
    return json.loads((generate.FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "text"), generate.files().items(), ids=generate.files())
def test_committed_vectors_are_what_the_source_makes(name: str, text: str) -> None:
    committed = (generate.FOLDER / name).read_text(encoding="utf-8")
    assert committed == text, (
        f"{name} differs: signed bytes changed. Say why in the commit, raise the version in the "
        "signing domain, then run `python -m tests.vectors.generate`."
    )


def test_every_message_type_has_a_vector() -> None:
    assert {row["type"] for row in load("messages.json")} == set(MESSAGES)


@pytest.mark.parametrize("row", load("messages.json"), ids=lambda row: row["type"])
def test_a_message_vector_opens_to_its_payload(row: dict[str, str]) -> None:
    kind, data = MESSAGES[row["type"]], bytes.fromhex(row["envelope"])
    signed = codec.open_signed(data, kind, network=row["network"], signer=row["signer"])
    assert signed.hash == row["hash"]
    assert signed.data == data
    assert codec.encode_payload(signed.message).decode() == row["payload"]
    assert KeyPair(bytes.fromhex(row["key_seed"])).peer_id == row["signer"]


@pytest.mark.parametrize("row", load("envelopes.json"), ids=lambda row: row["type"][:8])
def test_an_envelope_vector_verifies(row: dict[str, str]) -> None:
    found = envelope.decode(bytes.fromhex(row["envelope"]))
    found.verify(row["network"])
    signed = envelope.signed_bytes(row["network"], row["type"], found.payload)
    assert found.payload.hex() == row["payload"]
    assert signed.hex() == row["signed_bytes"]
    assert keys.verify(found.public_key, signed, found.signature)


def test_key_vectors() -> None:
    for row in load("keys.json"):
        public = keys.decode_public_key(bytes.fromhex(row["libp2p_public_key"]))
        assert public is not None
        assert public.hex() == row["public_key"]
        assert keys.peer_id_of(public) == row["peer_id"]
        assert keys.public_key_of(row["peer_id"]) == public


def test_frame_vectors() -> None:
    for row in load("frames.json"):
        (frame,) = frames.Decoder().feed(bytes.fromhex(row["frame"]))
        assert (frame.kind.name, frame.body.hex()) == (row["kind"], row["body"])


def test_tree_vectors_verify() -> None:
    rows = load("trees.json")
    roots = {row["size"]: bytes.fromhex(row["root"]) for row in rows}
    for row in rows:
        size, root = row["size"], roots[row["size"]]
        for index, proof in enumerate(row["inclusion"]):
            path = [bytes.fromhex(node) for node in proof]
            leaf = merkle.leaf_hash(f"leaf {index}".encode())
            assert merkle.verify_inclusion(leaf=leaf, index=index, size=size, path=path, root=root)
        for old, proof in enumerate(row["consistency"], start=1):
            path = [bytes.fromhex(node) for node in proof]
            assert merkle.verify_consistency(
                old=old, old_root=roots[old], size=size, root=root, path=path
            )


def test_the_checkpoint_vector_verifies() -> None:
    row = load("checkpoint.json")
    found = merkle.open_checkpoint(row["note"], KeyPair(bytes.fromhex(row["key_seed"])).public_key)
    assert (found.origin, found.size, found.root.hex()) == (row["origin"], row["size"], row["root"])


def test_the_receipt_vectors_verify() -> None:
    for row in load("receipts.json"):
        report = receipts.verify_bundle(row["file"].encode(), trusted=frozenset({row["trusted"]}))
        assert report.verdict == "valid"
        assert report.receipt is not None
        assert report.receipt.receipt == row["receipt_id"]
