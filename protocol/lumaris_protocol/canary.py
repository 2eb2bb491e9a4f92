"""The work that proves cores: a chain of states that takes its time however it is computed.

A state is a number of 256 bits. A round is `t = x ^ (x >> 128)`, then `x = t * M + C` modulo
2**256: a permutation that is linear neither over bits nor over integers, so no way is known to skip
rounds. Its 36 partial products are independent of each other, so that one lane keeps a core's
multiplier busy and two lanes on one core take twice as long. Python's own integers check it: a
round here costs about twenty rounds of the guest, so an asker checks one stretch of many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

from lumaris_protocol.limits import CHALLENGE_ROUNDS_MAX, CHALLENGE_STATES_MAX

STATE_BYTES = 32
_LIMBS, _LIMB_BITS = 8, 32
_MASK = (1 << 256) - 1
# The limbs of M have 28 bits, so that the guest adds eight products in 64 bits without a carry.
_M = tuple(
    int.from_bytes(hashlib.sha256(b"lumaris canary multiplier %d" % limb).digest()[:4], "big") >> 4
    | (limb == 0)
    for limb in range(_LIMBS)
)
_C = hashlib.sha256(b"lumaris canary constant").digest()
MULTIPLIER = sum(limb << (_LIMB_BITS * place) for place, limb in enumerate(_M))
CONSTANT = int.from_bytes(_C, "little")
# What wasmtime's meter counts for one round of the guest below; a test holds it to that.
FUEL_PER_ROUND = 260
# All states of an answer, 67 bytes each in JSON and a third more in the envelope, fit a document.
_ANSWER_STATES_MAX = 640


def stretches(parallel: int) -> int:
    """How many stretches the rounds of each lane are cut into; `rounds` must be a multiple."""
    return max(1, min(CHALLENGE_STATES_MAX, _ANSWER_STATES_MAX // parallel) - 1)


def first_state(nonce: str, lane: int) -> int:
    """Where a lane begins: nobody knows it before the nonce."""
    seed = b"lumaris canary\0" + nonce.encode() + b"\0" + lane.to_bytes(4, "big")
    return int.from_bytes(hashlib.sha256(seed).digest(), "little")


def fill_seed(nonce: str, lane: int) -> tuple[bytes, bytes]:
    """Password and salt of a lane's Argon2id fill of memory: one pass, a tag of 32 bytes."""
    seed = hashlib.sha256(b"lumaris fill\0%s\0%d" % (nonce.encode(), lane)).digest()
    return seed[:16], seed[16:]


def advance(state: int, rounds: int) -> int:
    """The state so many rounds later."""
    for _ in range(rounds):
        state = ((state ^ (state >> 128)) * MULTIPLIER + CONSTANT) & _MASK
    return state


def to_hex(state: int) -> str:
    """A state as it stands in an answer: its 32 bytes, the lowest first."""
    return state.to_bytes(STATE_BYTES, "little").hex()


def from_hex(text: str) -> int:
    """The state of an answer. Raises ValueError when it is not 32 bytes."""
    data = bytes.fromhex(text)
    if len(data) != STATE_BYTES:
        raise ValueError(f"a state has {STATE_BYTES} bytes, not {len(data)}")
    return int.from_bytes(data, "little")


def check_lane(
    states: Sequence[str], *, nonce: str, lane: int, rounds: int, parallel: int, stretch: int
) -> bool:
    """Whether a lane begins right and its chosen stretch is right. Nothing else is looked at.

    The caller draws `stretch` after it has the answer. Every state is the end of one stretch and
    the beginning of the next, so a lane with a share f of its stretches wrong passes with 1 - f.
    """
    pieces = stretches(parallel)
    if len(states) != pieces + 1 or rounds % pieces:
        return False
    try:
        first, begin, end = (from_hex(states[at]) for at in (0, stretch, stretch + 1))
    except ValueError:
        return False
    return first == first_state(nonce, lane) and advance(begin, rounds // pieces) == end


def order(state: int, *, rounds: int, pieces: int) -> bytes:
    """The guest's input file: its first state, the rounds of a stretch, and how many of these."""
    if not 0 <= rounds <= CHALLENGE_ROUNDS_MAX:
        raise ValueError(f"a lane takes 0 to {CHALLENGE_ROUNDS_MAX} rounds")
    return (
        state.to_bytes(STATE_BYTES, "little")
        + (rounds // pieces).to_bytes(8, "little")
        + pieces.to_bytes(8, "little")
    )


ORDER_FILE = "o"


@cache
def guest_text() -> str:
    """The guest as WebAssembly text.

    It reads `/in/o` (see `order`) and writes its states to standard output, 32 bytes each, the
    first one too. Its export `turn` makes rounds on the state in memory at 64 and does no I/O.
    """
    names = [f"$x{limb}" for limb in range(_LIMBS)]
    load = " ".join(
        f"(local.set {name} (i64.load32_u (i32.const {64 + 4 * limb})))"
        for limb, name in enumerate(names)
    )
    store = " ".join(
        f"(i64.store32 (i32.const {64 + 4 * limb}) (local.get {name}))"
        for limb, name in enumerate(names)
    )
    return f"""(module
 (import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
 (memory (export "memory") 1) (data (i32.const 32) "{ORDER_FILE}")
 (func $say (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 32))
  (if (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)) (then unreachable)))
 (func $turn (export "turn") (param $left i64)
  (local $acc i64) {" ".join(f"(local {name} i64) (local $n{name[2:]} i64)" for name in names)}
  {load}
  (block $done (loop $again
   (br_if $done (i64.eqz (local.get $left)))
   {_round(names)}
   (local.set $left (i64.sub (local.get $left) (i64.const 1))) (br $again)))
  {store})
 (func (export "_start") (local $pieces i64)
  (if (call $open (i32.const 3) (i32.const 0) (i32.const 32) (i32.const 1) (i32.const 0)
   (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 12)) (then unreachable))
  (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 48))
  (if (call $read (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 8))
   (then unreachable))
  (local.set $pieces (i64.load (i32.const 104)))
  (call $say)
  (block $done (loop $again
   (br_if $done (i64.eqz (local.get $pieces)))
   (call $turn (i64.load (i32.const 96))) (call $say)
   (local.set $pieces (i64.sub (local.get $pieces) (i64.const 1))) (br $again)))))"""


def _round(names: list[str]) -> str:
    """One round on the limbs: fold the upper half in, then one column of products after another."""
    half = _LIMBS // 2
    lines = [
        f"(local.set {low} (i64.xor (local.get {low}) (local.get {high})))"
        for low, high in zip(names[:half], names[half:], strict=True)
    ]
    for column in range(_LIMBS):
        constant = int.from_bytes(_C[4 * column : 4 * column + 4], "little")
        total = f"(i64.const {constant})"
        if column:
            total = f"(i64.add {total} (i64.shr_u (local.get $acc) (i64.const {_LIMB_BITS})))"
        for limb in range(column + 1):
            product = f"(i64.mul (local.get {names[limb]}) (i64.const {_M[column - limb]}))"
            total = f"(i64.add {total} {product})"
        lines.append(f"(local.set $acc {total})")
        kept = "(i64.and (local.get $acc) (i64.const 0xffffffff))"
        lines.append(f"(local.set $n{column} {kept})")
    lines += [f"(local.set {name} (local.get $n{at}))" for at, name in enumerate(names)]
    return "\n   ".join(lines)
