"""What a coordinator tells everybody: whom it no longer vouches for, and which keys are its own."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Count, Message, Part, Peer, Time


class Revoked(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A certificate that counts no more. Serial 0 is the peer itself: every certificate of it."""

    peer: Peer
    serial: Count
    at: Time
    reason: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]


class Revocations(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's revocations number `after` + 1 to `seq`, none left out.

    Whoever knows those up to `after` knows them up to `seq` now; others ask for the ones between.
    """

    TYPE: ClassVar[str] = "revocations"
    SIZE_MAX: ClassVar[int] = limits.NOTICE_BYTES_MAX
    coordinator: Peer
    after: Count
    seq: Count
    revoked: Annotated[tuple[Revoked, ...], Meta(max_length=limits.REVOCATIONS_PER_NOTICE_MAX)]
    issued_at: Time


class SigningKey(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key that the coordinator signs with. `revoked_at` 0: it was not revoked."""

    peer: Peer
    not_before: Time
    not_after: Time
    revoked_at: Time = 0


class KeyList(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's signing keys, signed by its root key, which stays offline.

    The highest `seq` counts. A key that is not in it is not the coordinator's.
    """

    TYPE: ClassVar[str] = "key_list"
    SIZE_MAX: ClassVar[int] = limits.NOTICE_BYTES_MAX
    root: Peer
    seq: Count
    keys: Annotated[tuple[SigningKey, ...], Meta(min_length=1, max_length=limits.SIGNING_KEYS_MAX)]
    issued_at: Time


class CheckpointNotice(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The newest head of the receipts log and the cosignatures it had: a signed note.

    The highest `seq` counts. Whoever gets it compares it with the heads that it saw before.
    """

    TYPE: ClassVar[str] = "checkpoint_notice"
    SIZE_MAX: ClassVar[int] = limits.NOTICE_BYTES_MAX
    seq: Count
    checkpoint: Annotated[str, Meta(max_length=limits.CHECKPOINT_CHARS_MAX)]
    issued_at: Time
