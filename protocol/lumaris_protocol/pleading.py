"""What a party shows in a dispute: the documents to choose, and the messages that carry them.

A session of ten thousand orders leaves far more than one side may show, so what decides comes
first: contradictions, the disputed order, the last word on what is owed, the highest voucher and
the ends; then the newest orders, each with all that decides about it or not at all. What a side
said again and again is shown once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from lumaris_protocol import codec, ends, envelope, rulings
from lumaris_protocol.agreements import Contract
from lumaris_protocol.dispute_file import DisputeFile
from lumaris_protocol.errors import EnvelopeError, RefusedError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    EVIDENCE_BUNDLES_MAX,
    EVIDENCE_BYTES_MAX,
    EVIDENCE_DOCUMENTS_MAX,
    KIB,
    SESSION_DOCUMENT_BYTES_MAX,
)
from lumaris_protocol.messages.base import Message, SessionMessage
from lumaris_protocol.messages.dispute import (
    DisputeClaim,
    DisputeEvidence,
    DisputeOpen,
    DisputeWithdraw,
)
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    JobEvent,
    WorkOrder,
)
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import BUYER_CLOSES, Close, Voucher
from lumaris_protocol.rulings import Session, work

# Evidence travels in base64, and the agreement's copies and the grant travel beside it; the largest
# work order and its delivery still go together.
_BUNDLE_BYTES: Final = 272 * KIB
_KINDS: Final[dict[str, type[SessionMessage]]] = {
    kind.TYPE: kind for kind in (WorkOrder, JobEvent, Delivery, Acceptance, Cancel, Voucher, Close)
}


@dataclass(frozen=True)
class Room:
    """What a side may still show."""

    documents: int = EVIDENCE_DOCUMENTS_MAX
    size_bytes: int = EVIDENCE_BYTES_MAX // 2

    def less(self, shown: Iterable[bytes]) -> Room:
        """What is left of it beside these."""
        shown = tuple(shown)
        return Room(
            max(0, self.documents - len(shown)),
            max(0, self.size_bytes - sum(map(len, shown))),
        )


@dataclass(frozen=True)
class Shown:
    """What one side has shown: its documents, how many bundles, and whether it is done.

    About a result that is run again nobody is: the run can be shown until it decides.
    """

    documents: tuple[bytes, ...]
    bundles: int
    done: bool

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken from it."""
        return self.done or self.bundles >= EVIDENCE_BUNDLES_MAX


@dataclass(frozen=True)
class _Kept:
    data: bytes
    hash: str
    signer: str
    message: SessionMessage


def choose(
    documents: Iterable[bytes], *, order: int = 0, room: Room | None = None
) -> tuple[bytes, ...]:
    """Of what was kept of a session, what to show; the disputed `order` first, if there is one.

    Documents are not verified here: whoever is shown them does. What is no evidence is left out.
    """
    left = room or Room()
    kept = [found for found in map(_open, dict.fromkeys(documents)) if found is not None]
    chosen: dict[bytes, None] = {}
    for group in _groups(kept, order):
        fresh = [one.data for one in group if one.data not in chosen]
        after = left.less(fresh)
        if len(fresh) > left.documents or sum(map(len, fresh)) > left.size_bytes:
            continue
        left = after
        chosen.update(dict.fromkeys(fresh))
    return tuple(one.data for one in kept if one.data in chosen)


def only(documents: Iterable[bytes], n: int) -> tuple[bytes, ...]:
    """What shows how order `n` came out: the order, and the seller's word of its end."""
    kept = [found for found in map(_open, dict.fromkeys(documents)) if found is not None]
    chosen = {
        one.data
        for one in _telling([one for one in kept if getattr(one.message, "n", 0) == n])
        if isinstance(one.message, WorkOrder) or ends.is_end(one.message)
    }
    return tuple(one.data for one in kept if one.data in chosen)


def shows_another_run(documents: Iterable[bytes]) -> bool:
    """Whether the work of another session, a checker's or a replica's, is among these."""
    for data in documents:
        try:
            found = envelope.decode(data, size_max=SESSION_DOCUMENT_BYTES_MAX)
        except EnvelopeError:
            continue
        if found.payload_type == Agreement.TYPE:
            return True
    return False


def _groups(kept: Sequence[_Kept], order: int) -> list[list[_Kept]]:
    """What belongs together, the most telling first."""
    by_order: dict[int, list[_Kept]] = defaultdict(list)
    for one in kept:
        if isinstance(one.message, WorkOrder | JobEvent | Delivery | Acceptance | Cancel):
            by_order[one.message.n].append(one)
    disputed = _telling(by_order.pop(order, []))
    # What nobody ordered or accepted counts for nothing.
    known = {one.message.n for one in kept if isinstance(one.message, WorkOrder | Acceptance)}
    by_age = sorted(by_order, key=lambda n: (n in known, n), reverse=True)
    newest = [_telling(by_order[n]) for n in by_age]
    return [*_contradictions(kept), disputed, *([one] for one in _last_words(kept)), *newest]


def _telling(said: Sequence[_Kept]) -> list[_Kept]:
    """Of all that was said of one order, what a ruling may look at: whoever repeats itself must not
    crowd out the rest."""
    orders = [one for one in said if isinstance(one.message, WorkOrder)]
    ended = [one for one in said if ends.is_end(one.message)]
    named = {_order_hash(one) for one in ended}
    order = next((one for one in orders if one.hash in named), orders[0] if orders else None)
    if order is not None:
        ended = [one for one in ended if _order_hash(one) == order.hash]
    kinds = (
        (order,) if order is not None else (),
        [one for one in ended if isinstance(one.message, JobEvent)],
        [one for one in ended if isinstance(one.message, Delivery)],
        [one for one in said if _is_word(one, accepted=True)],
        [one for one in said if _is_word(one, accepted=False)],
        [one for one in said if isinstance(one.message, Cancel)],
    )
    return [min(found, key=lambda one: one.message.seq) for found in kinds if found]


def _order_hash(one: _Kept) -> str:
    assert isinstance(one.message, JobEvent | Delivery)
    return one.message.order_hash


def _is_word(one: _Kept, *, accepted: bool) -> bool:
    return isinstance(one.message, Acceptance) and one.message.accepted is accepted


def _contradictions(kept: Sequence[_Kept]) -> list[list[_Kept]]:
    """Pairs that one signer should not have signed both: of each kind one, which is enough."""
    first: dict[tuple[object, ...], _Kept] = {}
    pairs: dict[tuple[str, str], list[_Kept]] = {}
    for one in kept:
        message = one.message
        places: list[tuple[str, str, int]] = [(one.signer, "seq", message.seq)]
        if isinstance(message, WorkOrder | Delivery):
            places.append((one.signer, message.TYPE, message.n))
        if ends.is_end(message):
            assert isinstance(message, JobEvent | Delivery)
            places.append((one.signer, "end", message.n))
        for place in places:
            other = first.setdefault(place, one)
            if other.data != one.data:
                pairs.setdefault(place[:2], [other, one])
    return list(pairs.values())


def _last_words(kept: Sequence[_Kept]) -> list[_Kept]:
    """The last acceptance, the highest voucher, and the end of each side: of several the one that
    it is held to, the buyer to the most that it closed with and the seller to the least."""
    words = [
        (one.message.total_nanos, one.message.n, at)
        for at, one in enumerate(kept)
        if isinstance(one.message, Acceptance) and one.message.accepted
    ]
    vouchers = [
        (one.message.total_nanos, at)
        for at, one in enumerate(kept)
        if isinstance(one.message, Voucher)
    ]
    found = [kept[max(words)[-1]]] if words else []
    found += [kept[max(vouchers)[-1]]] if vouchers else []
    buyers = {
        one.signer for one in kept if isinstance(one.message, WorkOrder | Acceptance | Voucher)
    }
    closes: dict[str, tuple[bool, int, _Kept]] = {}
    for one in kept:
        if isinstance(one.message, Close):
            total = one.message.total_nanos
            by_buyer = one.signer in buyers
            own = by_buyer and one.message.reason == BUYER_CLOSES
            rank = own, total if by_buyer else -total
            if one.signer not in closes or rank > closes[one.signer][:2]:
                closes[one.signer] = (*rank, one)
    return found + [one for *_, one in closes.values()]


def _open(data: bytes) -> _Kept | None:
    try:
        found = envelope.decode(data, size_max=SESSION_DOCUMENT_BYTES_MAX)
        kind = _KINDS.get(found.payload_type)
        if kind is None:
            return None
        return _Kept(data, found.hash, found.signer, codec.decode_payload(found.payload, kind))
    except (EnvelopeError, msgspec.MsgspecError):
        return None


def shown_by(file: DisputeFile, party: str) -> Shown:
    """What a party has shown, by a dispute file. Raises EnvelopeError for a damaged one."""
    opened = codec.open_signed(file.opened, DisputeOpen, network=file.network)
    documents = list(opened.message.evidence) if opened.signer == party else []
    bundles, done = 0, False
    for data in file.evidence:
        bundle = codec.open_signed(data, DisputeEvidence, network=file.network)
        if bundle.signer == party:
            documents += bundle.message.evidence
            bundles, done = bundles + 1, done or bundle.message.done
    return Shown(tuple(documents), bundles, done and opened.message.claim != "wrong_result")


def asked(session: Session, claim: DisputeClaim, *, order: int, paid_nanos: int) -> int:
    """The most that a claim comes to by what is shown; 0 where it is about no amount.

    `paid_nanos` is what was vouchered, or claimed.
    """
    if claim == "wrong_result":
        result = work.result_of(session, order)
        return result.price_nanos if result else 0
    if claim == "not_delivered":
        return max(0, paid_nanos - work.against_refund(session))
    found = work.worth(session)
    if claim == "unpaid_delivery":
        owed = found.delivered + found.rejected // 2 - paid_nanos
        return max(0, min(owed, session.contract.agreement.terms.exposure_nanos))
    return paid_nanos if claim == "stale_voucher" else 0


def opening(
    contract: Contract,
    grant: bytes,
    key: KeyPair,
    claim: DisputeClaim,
    *,
    order: int,
    amount_nanos: int,
    evidence: tuple[bytes, ...],
    network: str,
    now: int,
) -> bytes:
    """A signed DisputeOpen. Raises RefusedError `oversize`, or as `rulings.check_opening` does."""
    message = DisputeOpen(
        dispute=rulings.dispute_id(contract.hash, opener=key.peer_id, claim=claim, order=order),
        coordinator=contract.agreement.coordinator,
        opener=key.peer_id,
        agreement_by_buyer=contract.by_buyer,
        agreement_by_seller=contract.by_seller,
        grant=grant,
        claim=claim,
        order=order,
        amount_nanos=amount_nanos,
        evidence=evidence,
        issued_at=now,
    )
    rulings.check_opening(message, contract)
    return _sign(message, key, network)


def first_bundle_room() -> Room:
    """What an opening or one bundle has room for."""
    return Room(EVIDENCE_DOCUMENTS_MAX // 2, _BUNDLE_BYTES)


def bundles(
    dispute: str,
    agreement_hash: str,
    key: KeyPair,
    documents: Sequence[bytes],
    *,
    n: int,
    done: bool,
    network: str,
    now: int,
) -> list[bytes]:
    """Signed DisputeEvidence for these documents, from number `n` on; `done` stands in the last.

    Raises RefusedError `oversize` when they need more bundles than a side has.
    """
    parts: list[list[bytes]] = [[]]
    for data in documents:
        if parts[-1] and sum(map(len, parts[-1])) + len(data) > _BUNDLE_BYTES:
            parts.append([])
        parts[-1].append(data)
    if n + len(parts) > EVIDENCE_BUNDLES_MAX:
        raise RefusedError("oversize", f"A side shows at most {EVIDENCE_BUNDLES_MAX} bundles.")
    return [
        _sign(
            DisputeEvidence(
                dispute=dispute,
                agreement_hash=agreement_hash,
                party=key.peer_id,
                n=number,
                evidence=tuple(part),
                done=done and number == n + len(parts) - 1,
                issued_at=now,
            ),
            key,
            network,
        )
        for number, part in enumerate(parts, n)
    ]


def withdrawal(dispute: str, agreement_hash: str, key: KeyPair, *, network: str, now: int) -> bytes:
    """A signed DisputeWithdraw."""
    message = DisputeWithdraw(
        dispute=dispute, agreement_hash=agreement_hash, party=key.peer_id, issued_at=now
    )
    return _sign(message, key, network)


def _sign(message: Message, key: KeyPair, network: str) -> bytes:
    try:
        return codec.sign(message, key, network).data
    except ValueError as error:
        raise RefusedError("oversize", f"The documents do not fit: {error}.") from None
