"""Golden vectors: the exact bytes of everything that is signed, for this and other implementations.

`python -m tests.vectors.generate` writes the files beside this one, those of `network` too. Seeds,
times and ids are fixed, and Ed25519 is deterministic, so the same source always gives the same
bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lumaris_protocol import codec, envelope, frames, keys, merkle, receipts
from lumaris_protocol.frames import Kind
from tests.protocol import parties as p
from tests.protocol.samples import samples

FOLDER = Path(__file__).parent


def messages() -> list[dict[str, Any]]:
    """Every message type: its payload text, its envelope and its hash."""
    rows = []
    for kind, (message, key) in samples().items():
        signed = codec.sign(message, key, p.NETWORK)
        rows.append(
            {
                "type": kind,
                "network": p.NETWORK,
                "key_seed": key.seed.hex(),
                "signer": key.peer_id,
                "payload": codec.encode_payload(message).decode(),
                "envelope": signed.data.hex(),
                "hash": signed.hash,
            }
        )
    return rows


def envelopes() -> list[dict[str, Any]]:
    """Envelopes around opaque payloads, and the bytes their signature covers."""
    cases = [(b"", "voucher"), (b"{}", "voucher"), (b"x" * 127, "a"), (b"y" * 128, "b" * 64)]
    key = p.key_of("envelope")
    return [
        {
            "network": p.NETWORK,
            "key_seed": key.seed.hex(),
            "type": kind,
            "payload": payload.hex(),
            "signed_bytes": envelope.signed_bytes(p.NETWORK, kind, payload).hex(),
            "envelope": envelope.seal(key, p.NETWORK, kind, payload).hex(),
        }
        for payload, kind in cases
    ]


def peer_keys() -> list[dict[str, str]]:
    """Key seeds, public keys, their libp2p form and peer ids."""
    return [
        {
            "seed": key.seed.hex(),
            "public_key": key.public_key.hex(),
            "libp2p_public_key": keys.encode_public_key(key.public_key).hex(),
            "peer_id": key.peer_id,
        }
        for key in (p.BUYER, p.SELLER, p.COORDINATOR)
    ]


def frame_bytes() -> list[dict[str, str]]:
    """One frame of each kind."""
    bodies = {
        Kind.ENVELOPE: b"\x0a\x24",
        Kind.REFUSAL: b'{"code":"busy"}',
        Kind.HEADER: b"{}",
        Kind.DATA: bytes(300),
        Kind.END: b"",
    }
    return [
        {"kind": kind.name, "body": body.hex(), "frame": frames.encode(kind, body).hex()}
        for kind, body in bodies.items()
    ]


def trees() -> list[dict[str, Any]]:
    """Roots and proofs of trees of 1 to 9 leaves; leaf n is the text `leaf n`."""
    rows = []
    for size in range(1, 10):
        tree = merkle.Tree(merkle.leaf_hash(f"leaf {n}".encode()) for n in range(size))
        rows.append(
            {
                "size": size,
                "root": tree.root().hex(),
                "inclusion": [[h.hex() for h in tree.inclusion_proof(n)] for n in range(size)],
                "consistency": [
                    [h.hex() for h in tree.consistency_proof(old)] for old in range(1, size + 1)
                ],
            }
        )
    return rows


def checkpoint() -> dict[str, Any]:
    """A signed checkpoint note."""
    text = merkle.Checkpoint("lumaris.example/testnet", 3, bytes(range(32)))
    return {
        "key_seed": p.COORDINATOR.seed.hex(),
        "origin": text.origin,
        "size": text.size,
        "root": text.root.hex(),
        "note": merkle.sign_checkpoint(text, p.COORDINATOR),
    }


def bundles() -> list[dict[str, Any]]:
    """Receipt files that verify under the coordinator's peer id."""
    return [
        {
            "trusted": p.COORDINATOR.peer_id,
            "file": receipts.encode_bundle(p.settled(paid).bundle).decode(),
            "receipt_id": p.settled(paid).receipt.message.receipt,
        }
        for paid in (0, 123_457)
    ]


def files() -> dict[str, str]:
    """The text of every vector file by its name."""
    parts = {
        "messages.json": messages(),
        "envelopes.json": envelopes(),
        "keys.json": peer_keys(),
        "frames.json": frame_bytes(),
        "trees.json": trees(),
        "checkpoint.json": checkpoint(),
        "receipts.json": bundles(),
    }
    return {
        name: json.dumps(part, indent=1, ensure_ascii=False) + "\n" for name, part in parts.items()
    }


def main() -> None:
    """Write the files."""
    from tests.vectors import network  # loads libp2p, which the checks of this module do without

    for name, text in (files() | network.files()).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
