"""A seller among strangers: every bad byte is refused with a code, and honest buyers are served."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
from msgspec import structs

from lumaris.buyer import Buyer
from lumaris.images import resolve
from lumaris.pool import LEASE_S
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.simulated import SimulatedOverlay
from lumaris_protocol import agreements, codec, envelope, frames, ids, matching
from lumaris_protocol.effects import Effect, Send
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import FRAME_BYTES_MAX, MIB
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.execution import Acceptance, File, Limits
from lumaris_protocol.messages.negotiation import QuoteRequest
from lumaris_protocol.messages.payment import Voucher
from lumaris_protocol.protocols import BLOB, NEGOTIATE, SESSION
from tests import market as m
from tests.market import Market, Seller

pytestmark = [pytest.mark.slow, pytest.mark.planet]

LIMITS = Limits(
    wall_s=30,
    memory_bytes=16 * MIB,
    disk_bytes=MIB,
    fuel=0,
    log_bytes=1000,
    output_files=5,
)


@dataclass
class Attack:
    """An attacker with a real identity and a real certificate."""

    market: Market
    seller: Seller
    buyer: Buyer

    @property
    def host(self) -> SimulatedOverlay:
        return self.market.hosts[self.buyer.key.peer_id]

    async def stream(self, protocol: str) -> FramedStream:
        return FramedStream(await self.host.open_stream(self.seller.peer, protocol))

    async def send(self, protocol: str, data: bytes) -> str:
        """The code that raw bytes are answered with."""
        stream = await self.stream(protocol)
        try:
            await stream.stream.send_all(data)
            await stream.stream.send_eof()
            return await refusal(stream)
        finally:
            await stream.aclose()

    async def say(self, protocol: str, document: bytes) -> str:
        """The code that a document is answered with."""
        return await self.send(protocol, frames.encode(Kind.ENVELOPE, document))

    async def request(self, **changes: Any) -> QuoteRequest:
        """A request that would be answered with a quote, changed."""
        resolved = await resolve(self.market.guest)
        needs = self.buyer.pool.needs(self.market.request(m.HELLO), resolved)
        now = int(time.time())
        fields: dict[str, Any] = {
            "request": ids.make_id("request", os.urandom(ids.ID_RANDOM_BYTES)),
            "buyer": self.buyer.key.peer_id,
            "seller": self.seller.peer,
            "certificate": self.buyer.standing.certificate,
            "requirements": needs,
            "lease_s": 600,
            "cap_nanos": 1_000_000,
            "verification": "det",
            "nonce": os.urandom(16).hex(),
            "issued_at": now,
            "expires_at": now + 5,
        }
        return QuoteRequest(**(fields | changes))

    async def agreed(self) -> tuple[BuyerSession, bytes]:
        """A session's machine and its grant, before the opening."""
        request = await self.request()
        report = matching.match(request.requirements, self.buyer.market.adverts, lease_s=600)
        [offered] = await self.buyer.market.quotes(
            request.requirements, report, lease_s=600, cap_nanos=1_000_000, verification="det"
        )
        contract, key = await self.buyer.market.agree(offered)
        grant = await self.buyer._settling.grant(contract.by_buyer, contract.by_seller)
        machine = BuyerSession(contract, key, network=m.NETWORK, now=trio.current_time())
        return machine, grant

    async def opened(self) -> tuple[BuyerSession, FramedStream]:
        """An open session, driven by hand."""
        machine, grant = await self.agreed()
        stream = await self.stream(SESSION)
        await stream.send(Kind.ENVELOPE, sent(machine.open(grant)))
        machine.receive(await stream.expect(Kind.ENVELOPE), now=trio.current_time())
        return machine, stream


def sent(effects: list[Effect]) -> bytes:
    """The document of the only message among effects."""
    [message] = [effect for effect in effects if isinstance(effect, Send)]
    return message.data


async def refusal(stream: FramedStream) -> str:
    """The code of a stream's refusal; "" when it ended without one."""
    with trio.fail_after(m.WAIT_S):
        try:
            while frame := await stream.receive():
                if frame.kind == Kind.REFUSAL:
                    return read_refusal(frame.body).code
        except trio.BrokenResourceError:
            return "reset"
    return ""


@pytest.fixture
async def attack(market: Market) -> AsyncIterator[Attack]:
    """Afterwards an honest buyer is served and nothing is left behind."""
    seller = await market.seller()
    async with market.buyer("attacker") as buyer:
        yield Attack(market, seller, buyer)
    market.clock.ahead_s += 60  # agreements without a session lapse
    seller.node._desk.expire()
    async with market.buyer("honest") as honest:
        result = await honest.run(market.request(m.HELLO))
        assert result.ok, result
        await market.assert_at_rest(honest, cost_nanos=result.cost_nanos)


def noise(seed: str, size: int) -> bytes:
    """The same bytes for the same seed."""
    return hashlib.shake_256(seed.encode()).digest(size)


@pytest.mark.parametrize("protocol", [NEGOTIATE, SESSION, BLOB])
async def test_bytes_that_are_no_frames(attack: Attack, protocol: str, caplog):
    caplog.set_level(logging.WARNING)
    for n in range(20):
        code = await attack.send(protocol, noise(f"{protocol} {n}", 500))
        assert code in ("oversize", "malformed"), code
    whole = frames.encode(Kind.ENVELOPE, b"x" * 100)
    assert await attack.send(protocol, whole[:50]) == "truncated"
    assert await attack.send(protocol, whole[:2]) == "truncated"
    assert await attack.send(protocol, b"") == "truncated"
    assert await attack.send(protocol, (FRAME_BYTES_MAX + 1).to_bytes(4, "big")) == "oversize"
    assert await attack.send(protocol, bytes(4)) == "malformed"
    assert await attack.send(protocol, b"\0\0\0\1\x63") == "malformed"
    assert await attack.send(protocol, frames.encode(Kind.DATA, b"x")) == "malformed"
    assert await attack.send(protocol, frames.encode(Kind.HEADER, b"[" * 5000)) == "malformed"
    for n in range(20):
        kind = Kind.HEADER if protocol == BLOB else Kind.ENVELOPE
        assert await attack.send(protocol, frames.encode(kind, noise(str(n), 200))) == "malformed"
    kinds = [line for line in caplog.messages if "stranger" in line]
    assert len(kinds) == len(set(kinds)) <= 3, "each kind is logged once"


async def test_a_refusal_is_no_way_in(attack: Attack):
    for body in (b"", b"{}", b'{"code":"x"}', b'{"code":"internal","message":1}', noise("r", 99)):
        for protocol in (NEGOTIATE, SESSION, BLOB):
            code = await attack.send(protocol, frames.encode(Kind.REFUSAL, body))
            assert code in ("malformed", "internal"), (protocol, body)


async def test_bad_requests(attack: Attack, caplog):
    caplog.set_level(logging.WARNING)
    key, network = attack.buyer.key, m.NETWORK
    stranger, now = KeyPair(bytes(32)), int(time.time())

    async def answer(request: QuoteRequest, by: KeyPair = key, net: str = network) -> str:
        return await attack.say(NEGOTIATE, codec.sign(request, by, net).data)

    good = await attack.request()
    broken = bytearray(codec.sign(good, key, network).data)
    broken[-1] ^= 1
    assert await attack.say(NEGOTIATE, bytes(broken)) == "bad_signature"
    assert await answer(good, net="othernet") == "bad_signature"
    assert await answer(good, by=stranger) == "wrong_signer"
    foreign = structs.replace(good, buyer=stranger.peer_id)
    assert await answer(foreign) == "wrong_domain"
    assert await answer(foreign, by=stranger) == "wrong_signer"
    assert await answer(structs.replace(good, seller=stranger.peer_id)) == "wrong_domain"
    assert await answer(structs.replace(good, issued_at=now - 500, expires_at=now - 400)) == (
        "expired"
    )
    assert await answer(structs.replace(good, issued_at=now + 400, expires_at=now + 500)) == (
        "not_yet_valid"
    )
    assert await answer(structs.replace(good, expires_at=now + 10_000)) == "malformed"
    own = attack.seller.node._adverts.offer.certificate
    assert await answer(structs.replace(good, certificate=own)) == "not_certified"
    assert await answer(structs.replace(good, certificate=b"")) == "malformed"
    payload = msgspec.json.decode(codec.encode_payload(good))
    for change in ({"surprise": 1}, {"lease_s": -1}, {"cap_nanos": 1 << 60}, {"buyer": "me"}):
        raw = msgspec.json.encode(payload | change)
        data = envelope.seal(key, network, QuoteRequest.TYPE, raw)
        assert await attack.say(NEGOTIATE, data) == "unknown_field", change
    data = envelope.seal(key, network, "voucher", codec.encode_payload(good))
    assert await attack.say(NEGOTIATE, data) == "wrong_type"
    large = envelope.seal(key, network, QuoteRequest.TYPE, b" " * 70_000)
    assert await attack.say(NEGOTIATE, large) == "oversize"
    assert not attack.seller.quotes.holds
    lines = [line for line in caplog.messages if "kind=wrong_signer" in line]
    assert len(lines) == 1, "logged once"


async def test_a_replayed_request_and_agreement(attack: Attack):
    request = codec.sign(await attack.request(), attack.buyer.key, m.NETWORK).data
    stream = await attack.stream(NEGOTIATE)
    await stream.send(Kind.ENVELOPE, request)
    await stream.expect(Kind.ENVELOPE)
    assert await attack.say(NEGOTIATE, request) == "replayed"
    await stream.send(Kind.ENVELOPE, b"no agreement")
    assert await refusal(stream) == "malformed"
    await stream.aclose()
    assert await attack.say(NEGOTIATE, request) == "replayed", "also once its hold is gone"

    machine, _ = await attack.agreed()
    stream = await attack.stream(NEGOTIATE)
    fresh = codec.sign(await attack.request(), attack.buyer.key, m.NETWORK).data
    await stream.send(Kind.ENVELOPE, fresh)
    await stream.expect(Kind.ENVELOPE)
    await stream.send(Kind.ENVELOPE, machine.contract.by_buyer)
    assert await refusal(stream) == "quote_unknown"
    await stream.aclose()


async def test_a_quote_is_not_changed_on_acceptance(attack: Attack, monkeypatch):
    buyer = attack.buyer
    needs = (await attack.request()).requirements
    report = matching.match(needs, buyer.market.adverts, lease_s=LEASE_S)

    async def accept(**changes: Any) -> str:
        [offered] = await buyer.market.quotes(
            needs, report, lease_s=600, cap_nanos=1_000_000, verification="det"
        )

        def changed(*parts: Any, **fields: Any) -> Any:
            return structs.replace(agreements.draft(*parts, **fields), **changes)

        with monkeypatch.context() as patch:
            # The seller's own draft, which it compares with, stays as it is.
            cheating = SimpleNamespace(draft=changed, join=agreements.join)
            patch.setattr("lumaris.market.agreements", cheating)
            with pytest.raises(LumarisError) as caught:
                await buyer.market.agree(offered)
        return caught.value.code

    now = int(time.time())
    assert await accept(fee_bps=0) == "terms_changed"
    assert await accept(coordinator=buyer.key.peer_id) == "terms_changed"
    assert await accept(resources=structs.replace(needs.resources, cpu_millis=2000)) == (
        "terms_changed"
    )
    assert await accept(ends_at=now + 100_000) == "terms_changed"
    assert await accept(issued_at=now + 600, ends_at=now + 1200) == "terms_changed"
    assert await accept(buyer=attack.seller.peer) in ("terms_changed", "wrong_signer")
    assert not attack.seller.quotes.holds


async def test_bad_openings(attack: Attack):
    machine, grant = await attack.agreed()
    other, other_grant = await attack.agreed()

    def opening(grant: bytes, of: BuyerSession = machine) -> bytes:
        fresh = BuyerSession(of.contract, of._chain._key, network=m.NETWORK, now=0)
        return sent(fresh.open(grant))

    text = codec.open_signed(grant, BudgetGrant, network=m.NETWORK).message
    forged = codec.sign(text, attack.buyer.key, m.NETWORK).data
    assert await attack.say(SESSION, opening(forged)) == "wrong_signer"
    assert await attack.say(SESSION, opening(other_grant)) == "grant_invalid"
    assert await attack.say(SESSION, opening(b"")) == "malformed"
    broken = bytearray(opening(grant))
    broken[-1] ^= 1
    assert await attack.say(SESSION, bytes(broken)) == "bad_signature"
    machine.machine.state = "open"  # an order before the grant was shown
    _, effects = order(machine, await resolve(attack.market.guest))
    assert await attack.say(SESSION, sent(effects)) == "wrong_type"
    assert await attack.say(SESSION, machine.contract.by_buyer) == "wrong_type"

    async with attack.market.buyer("thief") as thief:
        theft = Attack(attack.market, attack.seller, thief)
        assert await theft.say(SESSION, opening(grant)) == "wrong_signer"
        assert (
            await theft.say(
                SESSION,
                opening(
                    grant,
                    BuyerSession(other.contract, KeyPair(bytes(32)), network=m.NETWORK, now=0),
                ),
            )
            == "wrong_signer"
        )
    assert not attack.seller.node._sessions.hosts
    assert await attack.seller.node._store.unsettled() == []


def order(machine: BuyerSession, image: Any, **changes: Any) -> tuple[int, list[Effect]]:
    """An order of the guest."""
    name = ids.make_id("job", os.urandom(ids.ID_RANDOM_BYTES))
    fields: dict[str, Any] = {
        "job": name,
        "image": image.digest,
        "command": ("guest", m.HELLO),
        "environment": {},
        "inputs": (),
        "limits": LIMITS,
        "idempotency_key": name,
        "now": trio.current_time(),
    }
    return machine.order(**(fields | changes))


async def test_a_session_is_opened_once(attack: Attack):
    machine, grant = await attack.agreed()
    first = sent(machine.open(grant))
    stream = await attack.stream(SESSION)
    await stream.send(Kind.ENVELOPE, first)
    machine.receive(await stream.expect(Kind.ENVELOPE), now=0)
    assert await attack.say(SESSION, first) == "wrong_signer"
    assert len(attack.seller.node._sessions.hosts) == 1, "the first one goes on"
    await stream.send(Kind.ENVELOPE, first)
    assert await refusal(stream) == "replayed"
    await stream.aclose()
    await attack.seller.assert_idle()
    assert await attack.say(SESSION, first) == "quote_unknown"
    await attack.seller.assert_settled()


Break = Callable[[BuyerSession], bytes]


def skip_one(machine: BuyerSession) -> bytes:
    machine._chain.seq += 1
    return sent(machine.close())


def fork(machine: BuyerSession) -> bytes:
    machine._chain.head = "sha256:" + "0" * 64
    return sent(machine.close())


def foreign_network(machine: BuyerSession) -> bytes:
    machine._chain._network = "othernet"
    return sent(machine.close())


def other_key(machine: BuyerSession) -> bytes:
    machine._chain._key = KeyPair(bytes(32))
    return sent(machine.close())


def unasked(machine: BuyerSession) -> bytes:
    machine.tab.cap_nanos = machine.terms.cap_nanos + 1
    return machine._chain.sign(Voucher, total_nanos=machine.terms.cap_nanos + 1).data


def stale(machine: BuyerSession) -> bytes:
    return machine._chain.sign(Voucher, total_nanos=0).data


def accept_nothing(machine: BuyerSession) -> bytes:
    return machine._chain.sign(Acceptance, n=7, accepted=True, total_nanos=0).data


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (skip_one, "out_of_sequence"),
        (fork, "broken_chain"),
        (foreign_network, "bad_signature"),
        (other_key, "wrong_signer"),
        (unasked, "unasked"),
        (stale, "voucher_stale"),
        (accept_nothing, "out_of_sequence"),
        (lambda _: b"noise", "malformed"),
    ],
)
async def test_a_rule_broken_while_a_job_runs(attack: Attack, bad: Break, code: str):
    """The session ends with the code, the job with it, and nothing is left of either."""
    machine, stream = await attack.opened()
    image = await resolve(attack.market.guest)
    warm = await attack.seller.node._tiers.executors["wasm"].has_image(image.digest)
    _, effects = order(machine, image, command=("guest", m.WAIT))
    await stream.send(Kind.ENVELOPE, sent(effects))
    with trio.fail_after(m.WAIT_S):
        while b"running" not in await stream.expect(Kind.ENVELOPE) and warm:
            pass
    await stream.send(Kind.ENVELOPE, bad(machine))
    assert await refusal(stream) == code
    await stream.aclose()
    await attack.seller.assert_idle()
    await attack.seller.assert_settled()


@asynccontextmanager
async def waiting_order(attack: Attack, data: bytes) -> AsyncIterator[tuple[str, File]]:
    """A session whose order waits for one input file; its id and the file."""
    machine, stream = await attack.opened()
    file = File(path="a", size_bytes=len(data), sha256=ids.digest(data))
    _, effects = order(machine, await resolve(attack.market.guest), inputs=(file,))
    await stream.send(Kind.ENVELOPE, sent(effects))
    with trio.fail_after(m.WAIT_S):
        while b"missing" not in await stream.expect(Kind.ENVELOPE):
            pass
    yield machine.contract.agreement.session, file
    await stream.aclose()
    await attack.seller.assert_idle()
    await attack.seller.assert_settled()


async def put(attack: Attack, session: str, file: Any, *parts: bytes, **changes: Any) -> str:
    """The answer to an upload: its code, or its last state."""
    header = {
        "session": session,
        "op": "put",
        "sha256": file.sha256,
        "size_bytes": file.size_bytes,
    }
    stream = await attack.stream(BLOB)
    try:
        await stream.send(Kind.HEADER, msgspec.json.encode(header | changes))
        state = ""
        with trio.fail_after(m.WAIT_S):
            while frame := await stream.receive():
                if frame.kind == Kind.REFUSAL:
                    return read_refusal(frame.body).code
                state = msgspec.json.decode(frame.body)["state"]
                if state == "ready":
                    for part in parts:
                        await stream.send(Kind.DATA, part)
                    await stream.send(Kind.END)
        return state
    finally:
        await stream.aclose()


def blobs_of(attack: Attack) -> Path:
    (host,) = attack.seller.node._sessions.hosts
    return host.workspace.blobs


async def test_files_nobody_asked_for(attack: Attack):
    data = noise("input", 1000)
    async with waiting_order(attack, data) as (session, file):
        other = File(path="a", size_bytes=3, sha256=ids.digest(b"abc"))
        assert await put(attack, session, other, b"abc") == "bad_input"
        assert await put(attack, session, file, size_bytes=1001) == "oversize"
        assert await put(attack, session, file, data, b"x") == "oversize"
        assert await put(attack, session, file, data[:-1]) == "output_mismatch"
        assert await put(attack, session, file, noise("other", 1000)) == "output_mismatch"
        for name in ("../../x", "sha256:../../x", "sha256:" + "0" * 63 + "/"):
            assert await put(attack, session, file, sha256=name) == "malformed"
        assert await put(attack, session, file, op="delete") == "malformed"
        assert await put(attack, session, file, surprise=1) == "malformed"
        assert await put(attack, session, file, size_bytes=-1) == "malformed"
        assert await put(attack, "ses_" + "a" * 24, file) == "not_found"
        assert await put(attack, "../../etc", file) == "malformed"
        assert await put(attack, session, file, op="get") == "not_found"
        async with attack.market.buyer("thief") as thief:
            theft = Attack(attack.market, attack.seller, thief)
            assert await put(theft, session, file, data) == "not_found"
        folder = blobs_of(attack)
        assert list(folder.iterdir()) == []
        assert await put(attack, session, file, data) == "stored"
        assert [path.read_bytes() for path in folder.iterdir()] == [data]


async def test_an_upload_that_stops_in_the_middle(attack: Attack):
    data = noise("input", 300_000)
    async with waiting_order(attack, data) as (session, file):
        stream = await attack.stream(BLOB)
        header = {"session": session, "op": "put", "sha256": file.sha256, "size_bytes": len(data)}
        await stream.send(Kind.HEADER, msgspec.json.encode(header))
        await stream.receive()
        await stream.send(Kind.DATA, data[:1000])
        await stream.aclose()
        folder = blobs_of(attack)
        await m.eventually(lambda: not list(folder.iterdir()), "nothing is kept")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a", "a/../../b", "a//b", ".", "a\\b", "a\0b", "x/" * 20 + "y"]
)
async def test_unsafe_input_names(attack: Attack, path: str):
    machine, stream = await attack.opened()
    file = File(path=path, size_bytes=1, sha256=ids.digest(b"a"))
    _, effects = order(machine, await resolve(attack.market.guest), inputs=(file,))
    await stream.send(Kind.ENVELOPE, sent(effects))
    event = await stream.expect(Kind.ENVELOPE)
    assert b"bad_input" in event
    await stream.aclose()
    await attack.seller.assert_idle()
    await attack.seller.assert_settled()
