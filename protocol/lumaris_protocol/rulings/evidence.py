"""Opening evidence: every document checked against the keys of its agreement before it counts.

What is admitted is a closed list. A document of the disputed session is signed by the session key
that the agreement gave to its side. A document of another session is admitted only behind both
signed copies of that session's agreement, and only from the party that bought there: this is how
the work of a drawn checker is shown. Which coordinator its agreement names does not matter: the
key of ours may have been replaced since the disputed session.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from lumaris_protocol import agreements, codec, envelope
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import (
    DISPUTE_FRAME_BYTES_MAX,
    EVIDENCE_BYTES_MAX,
    EVIDENCE_DOCUMENTS_MAX,
    OTHER_SESSIONS_MAX,
    SESSION_DOCUMENT_BYTES_MAX,
)
from lumaris_protocol.messages.base import Message, SessionMessage
from lumaris_protocol.messages.dispute import DisputeEvidence, DisputeOpen
from lumaris_protocol.messages.execution import Acceptance, Cancel, Delivery, JobEvent, WorkOrder
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Close, Settle, Voucher

_BY_BUYER: Final = (WorkOrder, Acceptance, Cancel, Voucher)
_BY_SELLER: Final = (JobEvent, Delivery)
_SESSION_KINDS: Final[dict[str, type[SessionMessage]]] = {
    kind.TYPE: kind for kind in (*_BY_BUYER, *_BY_SELLER, Close)
}
ADMITTED: Final = frozenset((*_SESSION_KINDS, Agreement.TYPE, Settle.TYPE))


@dataclass
class Session:
    """The admitted documents of one session, each once, in the order they were shown."""

    contract: Contract
    documents: list[Signed[SessionMessage]] = field(default_factory=list)
    settles: list[Signed[Settle]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, signed: Signed[SessionMessage]) -> None:
        """Keep a document that was not shown before."""
        if signed.hash not in self._seen:
            self._seen.add(signed.hash)
            self.documents.append(signed)

    def add_settle(self, signed: Signed[Settle]) -> None:
        """As `add`, of a claim on the escrow."""
        if signed.hash not in self._seen:
            self._seen.add(signed.hash)
            self.settles.append(signed)

    def by(self, session_key: str) -> list[Signed[SessionMessage]]:
        """The documents that one session key signed."""
        return [signed for signed in self.documents if signed.signer == session_key]


class Dossier:
    """All evidence of one dispute, opened. Each side may fill half of the room."""

    def __init__(self, contract: Contract, *, network: str) -> None:
        self.main = Session(contract)
        self.others: dict[str, Session] = {}  # by agreement hash
        self.network = network
        self._sizes: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def add(self, documents: Iterable[bytes], *, party: str) -> None:
        """Check and keep one bundle of a party, whole or not at all.

        Raises EnvelopeError for a document that does not verify, RefusedError `evidence_foreign`
        or `oversize`.
        """
        documents = tuple(documents)
        size = self._sizes.get(party, 0) + sum(map(len, documents))
        count = self._counts.get(party, 0) + len(documents)
        if size > EVIDENCE_BYTES_MAX // 2 or count > EVIDENCE_DOCUMENTS_MAX:
            raise RefusedError(
                "oversize",
                f"One side's evidence is at most {EVIDENCE_BYTES_MAX // 2} bytes in"
                f" {EVIDENCE_DOCUMENTS_MAX} documents.",
            )
        opened = [self._open(data) for data in documents]
        others = dict(self.others)
        for contract in self._contracts([item for item in opened if _is(item, Agreement)], party):
            others.setdefault(contract.hash, Session(contract))
        bought = [one for one in others.values() if one.contract.agreement.buyer == party]
        if len(bought) > OTHER_SESSIONS_MAX:
            raise RefusedError(
                "oversize", f"One side shows at most {OTHER_SESSIONS_MAX} other sessions."
            )
        placed = [(item, self._place(item, others)) for item in opened if not _is(item, Agreement)]
        self.others, self._sizes[party], self._counts[party] = others, size, count
        for item, session in placed:
            if isinstance(item.message, Settle):
                session.add_settle(Signed(item.message, item.signer, item.data))
            else:
                assert isinstance(item.message, SessionMessage)
                session.add(Signed(item.message, item.signer, item.data))

    def _open(self, data: bytes) -> Signed[Message]:
        found = envelope.decode(data, size_max=SESSION_DOCUMENT_BYTES_MAX)
        if found.payload_type not in ADMITTED:
            raise RefusedError("evidence_foreign", f"A {found.payload_type} is not evidence.")
        kind: type[Message] = _SESSION_KINDS.get(
            found.payload_type, Agreement if found.payload_type == Agreement.TYPE else Settle
        )
        return codec.open_decoded(found, kind, network=self.network)

    def _contracts(self, copies: list[Signed[Message]], party: str) -> list[Contract]:
        """The other agreements of a bundle; each needs both its copies."""
        by_payload: dict[bytes, list[Signed[Message]]] = {}
        for copy in copies:
            by_payload.setdefault(envelope.decode(copy.data).payload, []).append(copy)
        found = []
        for pair in by_payload.values():
            agreement = pair[0].message
            assert isinstance(agreement, Agreement)
            signed = {str(copy.signer): copy.data for copy in pair}
            if {agreement.buyer, agreement.seller} - set(signed):
                raise RefusedError("evidence_foreign", "An agreement lacks one of its signatures.")
            contract = agreements.join(
                signed[agreement.buyer], signed[agreement.seller], network=self.network
            )
            ours = self.main.contract
            if contract.hash == ours.hash:
                continue
            if (
                agreement.session == ours.agreement.session
                or agreement.buyer != party
                or party not in (ours.agreement.buyer, ours.agreement.seller)
            ):
                raise RefusedError(
                    "evidence_foreign", "Only an agreement that the party itself bought under."
                )
            found.append(contract)
        return found

    def _place(self, item: Signed[Message], others: dict[str, Session]) -> Session:
        """The session that a document belongs to, by its id and its signer together."""
        message = item.message
        assert isinstance(message, SessionMessage | Settle)
        for session in (self.main, *others.values()):
            agreement = session.contract.agreement
            if message.session == agreement.session and item.signer in _signers(item, agreement):
                return session
        raise RefusedError(
            "evidence_foreign", f"The {message.TYPE} is not signed by its side of a shown session."
        )


def check_frame(signed: Signed[DisputeOpen] | Signed[DisputeEvidence]) -> None:
    """An opening or a bundle is little more than its documents. Raises RefusedError `oversize`."""
    message, documents = signed.message, list(signed.message.evidence)
    if isinstance(message, DisputeOpen):
        documents += [message.agreement_by_buyer, message.agreement_by_seller, message.grant]
    encoded = sum(-(-len(data) // 3) * 4 for data in documents)
    if len(signed.data) > encoded + DISPUTE_FRAME_BYTES_MAX:
        raise RefusedError(
            "oversize",
            f"A {message.TYPE} is at most its documents in base64 and"
            f" {DISPUTE_FRAME_BYTES_MAX} bytes.",
        )


def _signers(item: Signed[Message], agreement: Agreement) -> tuple[str, ...]:
    message = item.message
    if isinstance(message, Settle):
        ours = message.party == item.signer and message.coordinator == agreement.coordinator
        return (agreement.buyer, agreement.seller) if ours else ()
    if isinstance(message, _BY_BUYER):
        return (agreement.buyer_session_key,)
    if isinstance(message, _BY_SELLER):
        return (agreement.seller_session_key,)
    return (agreement.buyer_session_key, agreement.seller_session_key)


def _is(item: Signed[Message], kind: type[Message]) -> bool:
    return isinstance(item.message, kind)
