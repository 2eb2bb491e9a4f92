"""Drawing a checker that nobody could choose.

The list of candidates and their weights is signed and logged first. The chance is the root of the
first signed head of the receipts log that holds the list: nobody knew it when the list was made,
and nobody can change the list after it. Candidates are sorted by peer id; the draw falls on one
with the probability of its weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Final

from lumaris_protocol.errors import RefusedError
from lumaris_protocol.messages.dispute import Candidate

_DOMAIN: Final = b"lumaris/checker/1"


def draw(
    candidates: Sequence[Candidate],
    *,
    root: bytes,
    dispute: str,
    round_: int,
    drawn: Collection[str] = (),
) -> str:
    """The peer that the draw falls on, of those not drawn before. Raises RefusedError
    `dispute_invalid` for a bad list."""
    ordered = sorted(candidates, key=lambda candidate: candidate.peer)
    if len({candidate.peer for candidate in ordered}) != len(ordered):
        raise RefusedError("dispute_invalid", "A candidate of the draw is listed twice.")
    ordered = [candidate for candidate in ordered if candidate.peer not in drawn]
    if not ordered:
        raise RefusedError("dispute_invalid", "The draw has no candidate.")
    total = sum(candidate.weight_nanos for candidate in ordered)
    seed = b"\x00".join((_DOMAIN, root, dispute.encode(), str(round_).encode()))
    # 512 bits against a sum under 2**64: no candidate gains a measurable part by the remainder.
    place = int.from_bytes(hashlib.sha512(seed).digest(), "big") % total
    for candidate in ordered:
        place -= candidate.weight_nanos
        if place < 0:
            return candidate.peer
    raise AssertionError("the place lies within the sum of the weights")


def check_candidates(candidates: Sequence[Candidate], *, parties: Collection[str]) -> None:
    """No party may be a candidate. Raises RefusedError."""
    if {candidate.peer for candidate in candidates} & {*parties}:
        raise RefusedError("dispute_invalid", "A party was a candidate.")
