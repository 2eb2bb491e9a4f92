"""A document whose signature was checked before is not checked again; any other one always is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import agreements, codec, envelope, settlement
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Settle
from tests.protocol import parties as p

CONTRACT, OTHER = p.contract(), p.contract(name="2")
GRANT = p.grant(CONTRACT).data
PAPERS = {
    "agreement_by_buyer": CONTRACT.by_buyer,
    "agreement_by_seller": CONTRACT.by_seller,
    "grant": GRANT,
    "voucher": p.voucher(CONTRACT, 500).data,
}
KNOWN = (CONTRACT.by_buyer, CONTRACT.by_seller, GRANT)
STRANGE = (*PAPERS.values(), OTHER.by_buyer, OTHER.by_seller, p.grant(OTHER).data)


def outcome(papers: dict[str, bytes], known: tuple[bytes, ...]) -> object:
    """What a claim with these papers comes to: what it proves, or the code that refuses it."""
    fields: dict[str, Any] = {
        "session": CONTRACT.agreement.session,
        "party": p.SELLER.peer_id,
        "coordinator": p.COORDINATOR.peer_id,
        "total_nanos": 500,
        "issued_at": p.NOW,
    }
    claim = codec.sign(Settle(**(fields | papers)), p.SELLER, p.NETWORK)
    try:
        found = settlement.open_claim(
            claim, network=p.NETWORK, coordinator=p.COORDINATOR.peer_id, known=known
        )
    except LumarisError as error:
        return error.code
    return found


def flip(data: bytes, place: float, bit: int) -> bytes:
    at = int(place * (len(data) - 1))
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def sealed_by(data: bytes, key: KeyPair) -> bytes:
    found = envelope.decode(data)
    return envelope.seal(key, p.NETWORK, found.payload_type, found.payload)


def under_another_name(data: bytes, place: float) -> bytes:
    """The words and the signature as they were, with somebody's own key beside them, or the
    signature of another document."""
    if place < 0.5:
        return data.replace(envelope.decode(data).public_key, p.STRANGER.public_key)
    return data[:-64] + STRANGE[int(place * 7) % 7][-64:]


forgeries = st.one_of(
    st.tuples(st.just(flip), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just(sealed_by), st.sampled_from([p.BUYER, p.SELLER, p.STRANGER])),
    st.tuples(st.just(under_another_name), st.floats(0, 0.99)),
    st.tuples(st.just(lambda _, other: other), st.sampled_from(STRANGE)),
)


@given(st.sampled_from(sorted(PAPERS)), forgeries, st.sets(st.sampled_from(KNOWN)))
def test_what_is_known_changes_no_verdict(
    name: str, forgery: tuple[Any, ...], known: set[bytes]
) -> None:
    forge, *arguments = forgery
    papers = PAPERS | {name: forge(PAPERS[name], *arguments)}
    assert outcome(papers, tuple(known)) == outcome(papers, ())


def test_what_is_known_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bytes] = []
    verify = envelope.Envelope.verify

    def noting(found: envelope.Envelope, network: str) -> None:
        checked.append(found.data)
        verify(found, network)

    monkeypatch.setattr(envelope.Envelope, "verify", noting)
    assert outcome(PAPERS, KNOWN) == outcome(PAPERS, ())
    assert checked == [PAPERS["voucher"], *KNOWN, PAPERS["voucher"]]


def test_a_known_document_still_has_to_be_the_right_one() -> None:
    known = (*KNOWN, OTHER.by_buyer, OTHER.by_seller)
    for first, second, code in (
        (CONTRACT.by_seller, CONTRACT.by_buyer, "wrong_signer"),
        (CONTRACT.by_buyer, CONTRACT.by_buyer, "wrong_signer"),
        (CONTRACT.by_buyer, OTHER.by_seller, "terms_changed"),
        (CONTRACT.by_buyer, GRANT, "wrong_type"),
    ):
        with pytest.raises(EnvelopeError) as caught:
            agreements.join(first, second, network=p.NETWORK, known=known)
        assert caught.value.code == code
    with pytest.raises(EnvelopeError) as caught:
        codec.open_signed(
            CONTRACT.by_buyer,
            Agreement,
            network=p.NETWORK,
            signer=p.STRANGER.peer_id,
            known=KNOWN,
        )
    assert caught.value.code == "wrong_signer"


def test_a_second_copy_that_is_no_agreement_has_its_own_error() -> None:
    text = codec.encode_payload(CONTRACT.agreement)
    for payload, code in (
        (b"{}", "unknown_field"),
        (text[:-1] + b',"more":1}', "unknown_field"),
        (b"junk", "malformed"),
        (codec.encode_payload(OTHER.agreement), "terms_changed"),
    ):
        second = envelope.seal(p.SELLER, p.NETWORK, Agreement.TYPE, payload)
        with pytest.raises(EnvelopeError) as caught:
            agreements.join(CONTRACT.by_buyer, second, network=p.NETWORK)
        assert caught.value.code == code
