"""What signatures cost beside the work they protect."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from nacl.signing import SigningKey, VerifyKey

from benchmarks.parts.ledger_market import deals
from benchmarks.parts.ledger_store import World
from lumaris_protocol import codec, merkle
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.messages.negotiation import Agreement
from tests.coordinator.builders import NETWORK

BATCH = 64


def measure_crypto(world: World) -> None:
    """Our envelope against the bare library, and a signature for each receipt against one for
    each batch."""
    key = KeyPair(b"k" * 32)
    deal = deals(1, coordinator=key.peer_id, now=1_800_000_000)[0]
    document = deal.signed_by(deal.seller)  # about as long as a receipt
    signed = codec.open_signed(document, Agreement, network=NETWORK)
    bare_key = SigningKey(b"k" * 32)
    bare = bare_key.sign(signed.data)
    verify_key = VerifyKey(bytes(bare_key.verify_key))
    checkpoint = Checkpoint("lumaris.devnet/log", 1_000, b"r" * 32)
    found = in_turn(
        {
            "open": lambda: codec.open_signed(document, Agreement, network=NETWORK),
            "bare": lambda: verify_key.verify(bare.message, bare.signature),
            "leaf": lambda: merkle.leaf_hash(signed.data),
            "sign": lambda: codec.sign(signed.message, key, NETWORK),
            "checkpoint": lambda: merkle.sign_checkpoint(checkpoint, key),
        },
        rounds=world.rounds * 5,
        seconds=world.seconds / 10,
    )
    row = world.row
    row("envelope: open and verify", found["open"], "us")
    row("bare Ed25519: verify, same bytes", found["bare"], "us")
    times = found["open"] / found["bare"]
    row("envelope / bare verify", times, "x", "<= 1.25", times <= 1.25)
    row("receipt: sign", found["sign"], "us")
    row("checkpoint: sign", found["checkpoint"], "us")
    batch = found["leaf"] + found["checkpoint"] / BATCH
    times = (found["leaf"] + found["sign"]) / batch
    row(f"signature each / one for {BATCH}", times, "x", ">= 1.1", times >= 1.1)


def in_turn(
    ways: dict[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, float]:
    """Microseconds of CPU per call of each way; the middle of rounds that alternate."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            calls, began, cpu = 0, time.perf_counter(), time.thread_time()
            while time.perf_counter() - began < seconds:
                call()
                calls += 1
            found[name].append(1e6 * (time.thread_time() - cpu) / calls)
    return {name: statistics.median(times) for name, times in found.items()}
