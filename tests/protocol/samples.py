"""One message of every type, with fixed content: the material of the golden vectors."""

from __future__ import annotations

from typing import Any

from lumaris_protocol import codec, merkle
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.budget import (
    AmendRequest,
    BondRequest,
    CreditRequest,
    GrantRequest,
    Registration,
)
from lumaris_protocol.messages.challenge import Challenge, ChallengeAnswer
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.messages.dispute import (
    Candidate,
    CheckerDraw,
    CheckerList,
    DisputeEvidence,
    DisputeOpen,
    DisputeSplit,
    DisputeWithdraw,
    Facts,
    Ruling,
)
from lumaris_protocol.messages.endpoint import Endpoint
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    JobEvent,
    LogChunk,
    Meter,
    SessionOpen,
    SessionReady,
    Usage,
    WorkOrder,
)
from lumaris_protocol.messages.identity import PeerLink, TlsRequest
from lumaris_protocol.messages.money import PayoutRequest
from lumaris_protocol.messages.notice import (
    CheckpointNotice,
    KeyList,
    Revocations,
    Revoked,
    SigningKey,
)
from lumaris_protocol.messages.payment import Amendment, Close, Settle, Voucher
from lumaris_protocol.messages.shard_map import Shard, ShardMap
from tests.protocol import parties as p


def samples() -> dict[str, tuple[Message, KeyPair]]:
    """A message of each type by its wire name, with the key that signs it."""
    agreed = p.contract()
    signed: list[tuple[Message, KeyPair]] = [
        (p.certificate(p.SELLER, "seller", "buyer").message, p.COORDINATOR),
        (p.advert().message, p.SELLER),
        (p.request().message, p.BUYER),
        (p.quote(p.request()).message, p.SELLER),
        (agreed.agreement, p.BUYER),
        (p.grant(agreed).message, p.COORDINATOR),
        (p.settled().receipt.message, p.COORDINATOR),
        (_shard_map(), p.COORDINATOR),
        (_checkpoint_notice(), p.COORDINATOR),
        (_revocations(), p.COORDINATOR),
        (_key_list(), p.STRANGER),
        (_amendment(agreed), p.BUYER),
        (_demand(), p.BUYER),
        (_endpoint(), p.SELLER),
        (_challenge(), p.BUYER),
        (_challenge_answer(), p.SELLER),
        *_to_coordinator(),
        *_disputes(),
        *((message, p.BUYER_SESSION) for message in _of_buyer()),
        *((message, p.SELLER_SESSION) for message in _of_seller()),
    ]
    return {message.TYPE: (message, key) for message, key in signed}


def _revocations() -> Revocations:
    revoked = Revoked(peer=p.SELLER.peer_id, serial=0, at=p.NOW, reason="key_lost")
    return Revocations(
        coordinator=p.COORDINATOR.peer_id, after=0, seq=1, revoked=(revoked,), issued_at=p.NOW
    )


def _key_list() -> KeyList:
    key = SigningKey(peer=p.COORDINATOR.peer_id, not_before=p.NOW, not_after=p.NOW + 86_400)
    return KeyList(root=p.STRANGER.peer_id, seq=1, keys=(key,), issued_at=p.NOW)


def _amendment(agreed: Contract) -> Amendment:
    terms, ends_at = agreed.agreement.terms, agreed.agreement.ends_at
    return Amendment(
        agreement_hash=agreed.hash,
        session=agreed.agreement.session,
        n=1,
        cap_nanos=2 * terms.cap_nanos,
        ends_at=ends_at,
        issued_at=p.NOW,
    )


def _checkpoint_notice() -> CheckpointNotice:
    return CheckpointNotice(seq=p.NOW, checkpoint=p.settled().bundle.checkpoint, issued_at=p.NOW)


def _shard_map() -> ShardMap:
    parts: list[tuple[int, tuple[str, ...], tuple[Any, ...]]] = [
        (1, ("eu", "eu-west"), ("cpu",)),
        (2, (), ("cpu",)),
        (3, (), ("gpu",)),
    ]
    return ShardMap(
        network=p.NETWORK,
        version=7,
        shards=tuple(Shard(id=n, regions=names, classes=kinds) for n, names, kinds in parts),
        issued_at=p.NOW,
        expires_at=p.NOW + 3600,
    )


def _endpoint() -> Endpoint:
    return Endpoint(
        peer=p.SELLER.peer_id,
        seq=3,
        addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{p.SELLER.peer_id}",),
        services=("index", "relay"),
        shards=(1, 2),
        issued_at=p.NOW,
        expires_at=p.NOW + 7200,
        certificate=p.certificate(p.SELLER, "seller").data,
    )


def _demand() -> Demand:
    return Demand(
        demand=p.id_of("demand", "1"),
        buyer=p.BUYER.peer_id,
        certificate=p.certificate(p.BUYER, "buyer").data,
        requirements=p.requirements(regions=("eu-north",)),
        lease_s=3600,
        answers_max=8,
        addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{p.BUYER.peer_id}",),
        issued_at=p.NOW,
        expires_at=p.NOW + 30,
    )


def _challenge() -> Challenge:
    return Challenge(
        challenge=p.id_of("challenge", "1"),
        asker=p.BUYER.peer_id,
        seller=p.SELLER.peer_id,
        certificate=p.certificate(p.BUYER, "buyer").data,
        kind="cores",
        parallel=2,
        rounds=1 << 20,
        nonce="0" * 31 + "3",
        issued_at=p.NOW,
        expires_at=p.NOW + 30,
    )


def _challenge_answer() -> ChallengeAnswer:
    asked = codec.sign(_challenge(), p.BUYER, p.NETWORK)
    return ChallengeAnswer(
        challenge_hash=asked.hash,
        seller=p.SELLER.peer_id,
        states=(("0123456789abcdef", "fedcba9876543210"), ("00" * 8, "11" * 8)),
        fuel=123_456,
        elapsed_ms=950,
        issued_at=p.NOW,
    )


def _to_coordinator() -> list[tuple[Message, KeyPair]]:
    agreed = p.contract()
    common: dict[str, Any] = {"coordinator": p.COORDINATOR.peer_id, "issued_at": p.NOW}
    both: dict[str, Any] = {
        "agreement_by_buyer": agreed.by_buyer,
        "agreement_by_seller": agreed.by_seller,
    }
    registration = Registration(
        peer=p.SELLER.peer_id,
        challenge="0" * 31 + "1",
        roles=("seller",),
        addresses=("/ip4/127.0.0.1/tcp/4001",),
        **common,
    )
    credit = CreditRequest(peer=p.BUYER.peer_id, amount_nanos=10**9, nonce="0" * 31 + "2", **common)
    payout = PayoutRequest(
        peer=p.SELLER.peer_id,
        adapter="test-credit",
        amount_nanos=10**9,
        currency="TEST",
        nonce="0" * 31 + "4",
        **common,
    )
    bond = BondRequest(
        peer=p.SELLER.peer_id,
        action="lock",
        amount_nanos=10**9,
        currency="TEST",
        nonce="0" * 31 + "5",
        **common,
    )
    amend = AmendRequest(
        buyer=p.BUYER.peer_id,
        agreement_hash=agreed.hash,
        amendment_by_buyer=codec.sign(_amendment(agreed), p.BUYER, p.NETWORK).data,
        **common,
    )
    link = PeerLink(peer=p.SELLER.peer_id, user="usr_" + "a" * 24, **common)
    tls = TlsRequest(peer=p.SELLER.peer_id, challenge="0" * 31 + "6", csr=b"\x30\x03csr", **common)
    request = GrantRequest(buyer=p.BUYER.peer_id, **both, **common)
    settle = Settle(
        session=agreed.agreement.session,
        party=p.SELLER.peer_id,
        total_nanos=500,
        grant=p.grant(agreed).data,
        voucher=p.voucher(agreed, 500).data,
        **both,
        **common,
    )
    return [
        (registration, p.SELLER),
        (credit, p.BUYER),
        (payout, p.SELLER),
        (bond, p.SELLER),
        (amend, p.BUYER),
        (link, p.SELLER),
        (tls, p.SELLER),
        (request, p.BUYER),
        (settle, p.SELLER),
    ]


def _disputes() -> list[tuple[Message, KeyPair]]:
    agreed = p.contract()
    text = agreed.agreement
    name = p.id_of("dispute", "1")
    about: dict[str, Any] = {
        "dispute": name,
        "agreement_hash": agreed.hash,
        "issued_at": p.NOW,
    }
    shown = (p.voucher(agreed, 500).data,)
    opened = DisputeOpen(
        dispute=name,
        coordinator=p.COORDINATOR.peer_id,
        opener=text.buyer,
        agreement_by_buyer=agreed.by_buyer,
        agreement_by_seller=agreed.by_seller,
        grant=p.grant(agreed).data,
        claim="not_delivered",
        order=0,
        amount_nanos=500,
        evidence=shown,
        issued_at=p.NOW,
    )
    listed = CheckerList(
        dispute=name,
        round=0,
        candidates=(Candidate(peer=p.STRANGER.peer_id, weight_nanos=10**9),),
        issued_at=p.NOW,
    )
    drawn = CheckerDraw(
        dispute=name,
        round=0,
        list_hash=p.digest_of("list"),
        checkpoint=p.settled().bundle.checkpoint,
        checker=p.STRANGER.peer_id,
        check_by=p.NOW + 86_400,
        issued_at=p.NOW,
    )
    facts = Facts(
        paid_nanos=500,
        claimed_nanos=500,
        refunded_orders=(4, 9),
        remainder_nanos=0,
        bond_nanos=1_000_000,
        stake_nanos=550,
        ended="deadline",
        opened_at=p.NOW,
        evidence_until=p.NOW + 3_600,
        ends_at=text.ends_at,
        checkers=(p.STRANGER.peer_id,),
    )
    ruling = Ruling(
        claim="not_delivered",
        order=0,
        opener=text.buyer,
        buyer=text.buyer,
        seller=text.seller,
        currency="TEST",
        fault="seller",
        rule="not_delivered",
        award_nanos=0,
        refund_nanos=500,
        slash_nanos=550,
        collected_nanos=550,
        victim_nanos=25,
        bond_returned=True,
        evidence_root=p.digest_of("evidence"),
        documents=2,
        facts=facts,
        **about,
    )
    more = DisputeEvidence(party=text.seller, n=0, evidence=shown, done=True, **about)
    return [
        (opened, p.BUYER),
        (more, p.SELLER),
        (DisputeWithdraw(party=text.buyer, **about), p.BUYER),
        (DisputeSplit(award_nanos=1, refund_nanos=2, **about), p.BUYER),
        (listed, p.COORDINATOR),
        (drawn, p.COORDINATOR),
        (ruling, p.COORDINATOR),
    ]


def _chain_part() -> dict[str, Any]:
    agreed = p.contract()
    return {"session": agreed.agreement.session, "seq": 0, "prev": agreed.hash}


def _of_buyer() -> list[Message]:
    agreed, chain = p.contract(), _chain_part()
    inputs = (p.file("in/a.txt", b"a"), p.file("in/ü.txt", b"u"))
    return [
        SessionOpen(agreement_hash=agreed.hash, grant=p.grant(agreed).data, **chain),
        WorkOrder(
            n=1,
            job=p.id_of("job", "1"),
            image=p.digest_of("image"),
            command=("python", "-c", "print('ü')\n"),
            environment={"A": "1"},
            inputs=inputs,
            input_root=merkle.files_root(inputs),
            limits=p.LIMITS,
            idempotency_key=p.id_of("job", "1"),
            **chain,
        ),
        Acceptance(n=1, accepted=True, total_nanos=500, **chain),
        Cancel(n=1, **chain),
        Voucher(total_nanos=500, **chain),
        Close(total_nanos=500, orders_accepted=1, reason="closed", **chain),
    ]


def _of_seller() -> list[Message]:
    chain, outputs = _chain_part(), (p.file("out.txt", b"result"),)
    usage = Usage(wall_ms=200, cpu_ms=150, memory_peak_bytes=1 << 20, fuel=12345)
    return [
        SessionReady(agreement_hash=p.contract().hash, **chain),
        JobEvent(
            n=1,
            order_hash=p.digest_of("order"),
            state="killed",
            reason="killed_memory",
            exit_status=137,
            at=p.NOW,
            **chain,
        ),
        LogChunk(n=1, stream="stdout", offset=0, data=bytes(range(256)), **chain),
        Meter(n=1, amount_nanos=500, usage=usage, **chain),
        Delivery(
            n=1,
            order_hash=p.digest_of("order"),
            exit_status=0,
            outputs=outputs,
            output_root=merkle.files_root(outputs),
            stdout=p.file("stdout", b"hello"),
            stderr=p.file("stderr"),
            usage=usage,
            amount_nanos=500,
            environment=p.digest_of("environment"),
            **chain,
        ),
    ]


def sample(kind: str) -> Signed[Message]:
    """The signed sample of one type."""
    message, key = samples()[kind]
    return codec.sign(message, key, p.NETWORK)
