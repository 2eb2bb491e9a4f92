"""A second checker of receipt files, written from the texts of RFC 6962, RFC 9162 and C2SP alone.

It shares no code with the packages under test: hashlib, base64, json, and Ed25519 of OpenSSL. What
does not hold raises `Wrong`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Wrong(Exception):  # noqa: N818 - what a checker finds, not a failure of it
    """A check that does not hold."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


# --- Merkle trees (RFC 6962, section 2.1) ---


def leaf_hash(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def tree_head(leaves: list[bytes]) -> bytes:
    """MTH over leaf hashes, by the definition."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return node_hash(tree_head(leaves[:k]), tree_head(leaves[k:]))


def root_from_path(leaf: bytes, index: int, size: int, path: list[bytes]) -> bytes:
    """PATH(m, D[n]) turned around, by the recursion of section 2.1.1."""
    if size == 1:
        need(not path, "a path that is too long")
        return leaf
    need(path, "a path that is too short")
    k = 1
    while 2 * k < size:
        k *= 2
    if index < k:
        return node_hash(root_from_path(leaf, index, k, path[:-1]), path[-1])
    return node_hash(path[-1], root_from_path(leaf, index - k, size - k, path[:-1]))


def roots_from_proof(
    old: int, size: int, path: list[bytes], old_root: bytes
) -> tuple[bytes, bytes]:
    """The roots of both trees from SUBPROOF(m, D[n], true) of section 2.1.2."""

    def walk(m: int, n: int, whole: bool, left: list[bytes]) -> tuple[bytes, bytes]:
        if m == n:
            if whole:
                need(not left, "a proof that is too long")
                return old_root, old_root
            need(len(left) == 1, "a proof of the wrong length")
            return left[0], left[0]
        need(left, "a proof that is too short")
        k = 1
        while 2 * k < n:
            k *= 2
        if m <= k:
            before, after = walk(m, k, whole, left[:-1])
            return before, node_hash(after, left[-1])
        before, after = walk(m - k, n - k, False, left[:-1])
        return node_hash(left[-1], before), node_hash(left[-1], after)

    return walk(old, size, True, path)


# --- signatures ---


def verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        raise Wrong("a signature") from error


def key_of(peer: str) -> bytes:
    """The Ed25519 key inside a libp2p peer id."""
    number = 0
    for char in peer:
        number = number * 58 + ALPHABET.index(char)
    raw = number.to_bytes(38, "big")
    need(raw[:6] == bytes.fromhex("002408011220"), "a peer id")
    return raw[6:]


# --- notes (C2SP signed-note, tlog-checkpoint, tlog-cosignature) ---


def split_note(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The text and the signatures, each a key name and its bytes."""
    need(note.endswith("\n") and "\n\n" in note, "a note")
    cut = note.rindex("\n\n")
    lines = []
    for line in note[cut + 2 : -1].split("\n"):
        dash, name, data = line.split(" ")
        need(dash == "\u2014", "a signature line")
        lines.append((name, base64.b64decode(data, validate=True)))
    return note[: cut + 1], lines


def key_id(name: str, kind: int, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def open_vkey(vkey: str) -> tuple[str, int, bytes]:
    name, shown, material = vkey.split("+", 2)
    data = base64.b64decode(material)
    need(shown == key_id(name, data[0], data[1:]).hex(), "a verifier key")
    return name, data[0], data[1:]


def signed_by(note: str, name: str, kind: int, public_key: bytes) -> list[int]:
    """The times of the key's signatures on the note (0 for plain ones); each must verify."""
    text, lines = split_note(note)
    times = []
    for shown, data in lines:
        if shown != name or data[:4] != key_id(name, kind, public_key):
            continue
        if kind == 1:
            verify(public_key, text.encode(), data[4:])
            times.append(0)
        else:
            at = int.from_bytes(data[4:12], "big")
            verify(public_key, f"cosignature/v1\ntime {at}\n{text}".encode(), data[12:])
            times.append(at)
    return times


def open_head(note: str, origin: str, public_key: bytes) -> tuple[int, bytes]:
    """Size and root of a checkpoint that the log signed."""
    need(signed_by(note, origin, 1, public_key), "the log's signature")
    lines = split_note(note)[0].split("\n")
    need(lines[0] == origin and lines[3:] == [""] and str(int(lines[1])) == lines[1], "a head")
    return int(lines[1]), base64.b64decode(lines[2], validate=True)


# --- envelopes ---


def open_envelope(data: bytes, network: str) -> tuple[bytes, str, dict[str, Any]]:
    """Who signed it, its type and its content."""
    parts, at = {}, 0
    while at < len(data):
        field, at = varint(data, at)
        size, at = varint(data, at)
        need(field & 7 == 2 and at + size <= len(data), "an envelope")
        parts[field >> 3] = data[at : at + size]
        at += size
    need(list(parts) == [1, 2, 3, 5], "an envelope's fields")
    need(parts[1][:4] == bytes.fromhex("08011220"), "an Ed25519 key")
    key, kind = parts[1][4:], parts[2].decode()
    domain = f"lumaris/{network}/{kind}/v1".encode()
    verify(key, b"".join(length(part) + part for part in (domain, parts[2], parts[3])), parts[5])
    return key, kind, json.loads(parts[3])


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        need(at < len(data) and shift < 35, "a varint")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def length(part: bytes) -> bytes:
    size, out = len(part), b""
    while size >= 0x80:
        out += bytes([size & 0x7F | 0x80])
        size >>= 7
    return out + bytes([size])


# --- receipt files ---


def check_file(data: bytes, *, coordinator: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Check a receipt file whose coordinator is known; the receipt, and who cosigned when."""
    try:
        return _check_file(json.loads(data), key_of(coordinator))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Wrong("the form") from error


def _check_file(file: dict[str, Any], coordinator: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    network = file["network"]
    document = base64.b64decode(file["receipt"], validate=True)
    signer, kind, receipt = open_envelope(document, network)
    need((signer, kind) == (coordinator, "receipt"), "the receipt's signer")
    agreement = _check_agreement(file, network, receipt)
    _check_money(file, network, receipt, agreement, coordinator)
    salt = base64.b64decode(file["salt"], validate=True)
    need(len(salt) == 32, "the salt")
    leaf = leaf_hash(hashlib.sha256(salt + document).digest())
    proof = file["proof"]
    size, root = open_head(file["checkpoint"], f"lumaris.{network}/log", coordinator)
    path = [bytes.fromhex(name.removeprefix("sha256:")) for name in proof["hashes"]]
    need(proof["size"] == size and 0 <= proof["index"] < size, "the proof's place")
    need(root_from_path(leaf, proof["index"], size, path) == root, "the inclusion proof")
    return receipt, cosigners(file["checkpoint"], network)


def cosigners(note: str, network: str) -> dict[str, int]:
    """The witnesses of the network on a note, by peer id, with the time of each."""
    found = {}
    start = f"lumaris.{network}/witness/"
    for name, _ in split_note(note)[1]:
        if name.startswith(start):
            peer = name[len(start) :]
            times = signed_by(note, name, 4, key_of(peer))
            if times:
                found[peer] = max(times)
    return found


def _check_agreement(file: dict[str, Any], network: str, receipt: dict[str, Any]) -> dict[str, Any]:
    texts = []
    for side in ("buyer", "seller"):
        data = base64.b64decode(file[f"agreement_by_{side}"], validate=True)
        signer, kind, found = open_envelope(data, network)
        need(kind == "agreement" and signer == key_of(found[side]), f"the {side}'s signature")
        texts.append(found)
    need(texts[0] == texts[1], "one agreement")
    for name in ("session", "buyer", "seller", "fee_bps", "verification"):
        need(receipt[name] == texts[0][name], name)
    return texts[0]


def _check_money(
    file: dict[str, Any],
    network: str,
    receipt: dict[str, Any],
    agreement: dict[str, Any],
    coordinator: bytes,
) -> None:
    signer, kind, grant = open_envelope(base64.b64decode(file["grant"], validate=True), network)
    need(kind == "budget_grant" and signer == coordinator, "the grant's signer")
    need(grant["agreement_hash"] == receipt["agreement_hash"], "the grant's agreement")
    need(grant["cap_nanos"] == receipt["cap_nanos"], "the cap")
    paid = receipt["paid_nanos"]
    if file["voucher"] is None:
        need(paid == 0, "paid without a voucher")
    else:
        data = base64.b64decode(file["voucher"], validate=True)
        signer, kind, voucher = open_envelope(data, network)
        need(kind == "voucher" and signer == key_of(agreement["buyer_session_key"]), "the voucher")
        need(voucher["session"] == receipt["session"], "the voucher's session")
        need(f"sha256:{hashlib.sha256(data).hexdigest()}" == receipt["voucher_hash"], "its hash")
        need(paid <= voucher["total_nanos"], "paid more than vouchered")
    need(receipt["fee_nanos"] == paid * receipt["fee_bps"] // 10_000, "the fee")
    need(receipt["seller_nanos"] + receipt["fee_nanos"] == paid, "the seller's part")
    need(paid + receipt["refund_nanos"] == receipt["cap_nanos"], "the refund")
