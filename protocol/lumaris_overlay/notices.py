"""What coordinators tell everybody: which of it counts, and what a peer keeps of it.

Each document with revocations counts for as long as a certificate that it names could be valid, and
is kept until another repeats it. Of the other types the newest one of each signer is kept. A second
document with the number of the first is kept and passed on once: a coordinator that says two things
at once is to be seen by everybody.
Pure: time is an argument.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from lumaris_overlay.coordinator_keys import CoordinatorKeys
from lumaris_overlay.ports import Notice
from lumaris_protocol import codec, envelope, key_list
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import CLOCK_SKEW_S, NOTICE_BYTES_MAX, NOTICES_KEPT_MAX
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.notice import CheckpointNotice, KeyList, Revocations
from lumaris_protocol.revocations import REMEMBERED_S, RevokedSet

REVOCATIONS: Final = Revocations.TYPE
_SAME_SEQ_MAX = 2
_KINDS = (CheckpointNotice, KeyList, Revocations)


@dataclass(frozen=True)
class _Kept:
    notice: Notice
    until: float
    after: int = 0  # of revocations: it holds those that follow this number


class NoticeGate:
    """Checks a notice with its bytes, the clock, and the coordinators' keys and roots."""

    def __init__(
        self,
        network: str,
        coordinator_keys: Set[PeerId],
        roots: frozenset[PeerId] = frozenset(),
    ) -> None:
        self._network, self._roots = network, roots
        self.keys = CoordinatorKeys(coordinator_keys)

    def check(self, data: bytes, now: float) -> Signed[Message]:
        """The notice inside `data`. Raises EnvelopeError with the code of what is wrong."""
        found = envelope.decode(data, size_max=NOTICE_BYTES_MAX)
        signed: Signed[Message]
        if found.payload_type == KeyList.TYPE:
            self._require(found.signer, self._roots)
            signed = key_list.open_list(data, network=self._network)  # type: ignore[assignment]
        elif found.payload_type == Revocations.TYPE:
            self._require(found.signer, self.keys)
            signed = codec.open_decoded(found, Revocations, network=self._network)
        elif found.payload_type == CheckpointNotice.TYPE:
            self._require(found.signer, self.keys)
            signed = codec.open_decoded(found, CheckpointNotice, network=self._network)
        else:
            raise EnvelopeError("wrong_type", f"A {found.payload_type} is no notice.")
        issued_at = _issued_at(signed.message)
        if issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The notice is dated in the future.")
        if now > _until(signed.message):
            raise EnvelopeError("expired", "The notice is too old to matter.")
        return signed

    def _require(self, signer: PeerId, among: Set[PeerId]) -> None:
        if signer not in among:
            raise EnvelopeError("wrong_signer", f"{signer} is no coordinator of ours.")


class NoticeBoard:
    """The notices that a peer keeps, and who is revoked by them."""

    def __init__(self, gate: NoticeGate) -> None:
        self.revoked = RevokedSet()
        self._gate = gate
        self._kept: dict[bytes, _Kept] = {}  # by envelope; the oldest to come is first

    @property
    def keys(self) -> CoordinatorKeys:
        """The coordinators' keys; they follow the lists on the board."""
        return self._gate.keys

    def holds(self, data: bytes) -> bool:
        """Whether exactly this document is kept."""
        return data in self._kept

    def offer(self, data: bytes, now: float) -> Notice | None:
        """Take a document in; None when it says nothing new. Raises EnvelopeError when invalid."""
        if data in self._kept:
            return None
        signed = self._gate.check(data, now)
        message = signed.message
        notice = Notice(message.TYPE, signed.signer, _seq(message), data)
        self._expire(now)
        held = [each for each in self._kept.values() if _series(each.notice) == _series(notice)]
        if isinstance(message, Revocations):
            known = self.revoked.known(message.coordinator)
            fresh = self.revoked.add(message, now)
            if not fresh and self.revoked.known(message.coordinator) == known:
                return None
            older = [
                each
                for each in held
                if message.after <= each.after and each.notice.seq <= message.seq
            ]
            self._keep(notice, older, _until(message), message.after)
            return notice
        same = sum(each.notice.seq == notice.seq for each in held)
        if same >= _SAME_SEQ_MAX or any(each.notice.seq > notice.seq for each in held):
            return None
        if isinstance(message, KeyList):
            self._gate.keys.learn(message)
        older = [each for each in held if each.notice.seq < notice.seq]
        self._keep(notice, older, _until(message))
        return notice

    def notices(self) -> tuple[Notice, ...]:
        """What is kept, the oldest to come first."""
        return tuple(each.notice for each in self._kept.values())

    def documents(self) -> tuple[bytes, ...]:
        """The bytes of what is kept."""
        return tuple(self._kept)

    def _keep(self, notice: Notice, older: list[_Kept], until: float, after: int = 0) -> None:
        """Keep a notice in place of those whose word it repeats or replaces."""
        for each in older:
            del self._kept[each.notice.envelope]
        self._kept[notice.envelope] = _Kept(notice, until, after)
        if len(self._kept) > NOTICES_KEPT_MAX:
            # Of a long chain the oldest link goes; the single newest of the other types stay.
            chain = [each.notice for each in self._kept.values() if each.notice.kind == REVOCATIONS]
            oldest = min(chain, key=lambda each: each.seq) if chain else self.notices()[0]
            del self._kept[oldest.envelope]

    def _expire(self, now: float) -> None:
        for data in [data for data, each in self._kept.items() if each.until < now]:
            del self._kept[data]


def revoked_in(notice: Notice) -> frozenset[str]:
    """The peers that a kept notice revokes, whole or one of their certificates."""
    if notice.kind != REVOCATIONS:
        return frozenset()
    message = codec.decode_payload(envelope.decode(notice.envelope).payload, Revocations)
    return frozenset(each.peer for each in message.revoked)


def _series(notice: Notice) -> tuple[str, PeerId]:
    return notice.kind, notice.signer


def _seq(message: Message) -> int:
    assert isinstance(message, _KINDS), "the gate lets nothing else through"
    return message.seq


def _issued_at(message: Message) -> int:
    assert isinstance(message, _KINDS), "the gate lets nothing else through"
    return message.issued_at


def _until(message: Message) -> float:
    """When a notice stops to matter."""
    if isinstance(message, Revocations):
        return message.issued_at + REMEMBERED_S
    return float("inf")  # the newest counts until a newer one does
