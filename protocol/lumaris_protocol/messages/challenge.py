"""Asking a seller to prove what it claims to have, and its signed answer.

The asker measures the time from outside: what a machine says of its own clock proves nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Count,
    Digest,
    Id,
    Message,
    Nonce,
    Peer,
    SmallDocument,
    Time,
)

HexWord = Annotated[str, Meta(pattern=r"^[0-9a-f]{16,128}\Z")]


class Challenge(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fill `parallel` cores with `rounds` rounds each, or hold `parallel` times `memory_bytes`.

    Cores run the canary guest of `lumaris_protocol.canary`, whose states follow from the nonce;
    memory is filled by Argon2id with one pass, all at once.
    """

    TYPE: ClassVar[str] = "challenge"
    challenge: Id
    asker: Peer
    seller: Peer
    certificate: SmallDocument
    kind: Literal["cores", "memory"]
    parallel: Annotated[int, Meta(ge=1, le=limits.CHALLENGE_PARALLEL_MAX)]
    rounds: Annotated[int, Meta(ge=0, le=limits.CHALLENGE_ROUNDS_MAX)] = 0
    memory_bytes: Annotated[int, Meta(ge=0, le=limits.CHALLENGE_MEMORY_BYTES_MAX)] = 0
    nonce: Nonce
    issued_at: Time
    expires_at: Time


class ChallengeAnswer(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The states that the work passed through, so that the asker can check any stretch of it."""

    TYPE: ClassVar[str] = "challenge_answer"
    challenge_hash: Digest
    seller: Peer
    # For each of the parallel runs: its states at even distances (cores), or its one tag (memory).
    states: Annotated[
        tuple[Annotated[tuple[HexWord, ...], Meta(max_length=limits.CHALLENGE_STATES_MAX)], ...],
        Meta(max_length=limits.CHALLENGE_PARALLEL_MAX),
    ]
    fuel: Count = 0
    elapsed_ms: Count
    issued_at: Time
