"""Challenges over the simulated network: who is honest passes, who lies does not."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from msgspec import structs

from lumaris.challenges import Prober, Proof, check_cores, find_seller
from lumaris.cli.root import root
from lumaris_node.challenges import Belonging, Challenges
from lumaris_node.executors.wasm.executor import WasmExecutor
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated import SimulatedOverlay, open_network
from lumaris_protocol import canary, codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import GIB, MIB
from lumaris_protocol.machines.desk import QuoteDesk
from lumaris_protocol.messages.advert import Advert, MembershipCertificate, PriceTable, Resources
from lumaris_protocol.messages.challenge import Challenge, ChallengeAnswer
from lumaris_protocol.protocols import CHALLENGE

NETWORK = "devnet"
COORDINATOR, SELLER, BUYER = (KeyPair(bytes([seed]) * 32) for seed in (1, 2, 3))


def certificate(key: KeyPair, signer: KeyPair = COORDINATOR) -> bytes:
    now = int(time.time())
    message = MembershipCertificate(
        peer=key.peer_id,
        account="acc_" + "a" * 24,
        roles=("buyer", "seller"),
        bond_band=0,
        serial=1,
        issued_at=now,
        expires_at=now + 3600,
    )
    return codec.sign(message, signer, NETWORK).data


def advert(**benchmarks: int) -> Advert:
    now = int(time.time())
    return Advert(
        seller=SELLER.peer_id,
        seq=1,
        issued_at=now,
        expires_at=now + 600,
        region="local",
        total=Resources(),
        free=Resources(),
        runtimes=(),
        benchmarks=benchmarks,
        prices=PriceTable(currency="TEST", start_nanos=0, cpu_core_s_nanos=0, memory_gib_s_nanos=0),
        lease_s_max=60,
        certificate=certificate(SELLER),
    )


@dataclass
class Pair:
    """A seller that answers challenges and a buyer that asks."""

    challenges: Challenges
    prober: Prober
    buyer: SimulatedOverlay
    seller: SimulatedOverlay
    quotes: QuoteDesk
    closed: list[str]  # by the owner

    async def answer_with(
        self, stack: AsyncExitStack, lie: Callable[[Challenge, ChallengeAnswer], ChallengeAnswer]
    ) -> None:
        """The seller does its work, and says something else."""
        honest = self.challenges._answer

        async def lying(asked):
            right = await honest(asked)
            return codec.sign(lie(asked.message, right.message), SELLER, NETWORK)

        self.challenges._answer = lying  # type: ignore[method-assign]
        await stack.enter_async_context(self.seller.serve(CHALLENGE, self.challenges.serve))


@asynccontextmanager
async def opened(folder: Path, modules: Path) -> AsyncIterator[Pair]:
    wasm = WasmExecutor.open(modules)
    quotes, closed = QuoteDesk(Resources(cpu_millis=4000, memory_bytes=GIB)), list[str]()
    challenges = Challenges(
        SELLER,
        Belonging(NETWORK, frozenset({COORDINATOR.peer_id})),
        wasm=wasm,
        folder=folder / "challenges",
        aside=quotes.aside,
        selling=lambda: not closed,
        clock=time.time,
    )
    try:
        async with open_network(NETWORK, frozenset({COORDINATOR.peer_id})) as network:
            seller, buyer = network.host(SELLER), network.host(BUYER)
            await seller.present(certificate(SELLER))
            await buyer.present(certificate(BUYER))
            await buyer.connect([seller.address])
            prober = Prober(buyer, BUYER, NETWORK, lambda: certificate(BUYER))
            yield Pair(challenges, prober, buyer, seller, quotes, closed)
    finally:
        await wasm.aclose()


@pytest.fixture
async def pair(tmp_path: Path, compiled: Path) -> AsyncIterator[Pair]:
    async with opened(tmp_path, compiled) as found:
        yield found


# A moment on most machines, so that tests are quick: the rate is not what they are about.
SLOW = {"wasm_mfuel_s": 100}


@pytest.mark.slow
async def test_honest_cores_pass(pair: Pair):
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        proof = await pair.prober.cores(advert(**SLOW), parallel=2)
    assert proof.parallel == proof.checked == 2
    assert proof.claimed == 200_000_000
    assert proof.proven > 0
    answer = codec.open_signed(proof.answer, ChallengeAnswer, network=NETWORK).message
    assert len(answer.states) == 2
    assert answer.fuel >= 2 * 100_000_000 * 1.9
    assert pair.challenges.counts == {"answered": 1}
    assert not list((pair.challenges._folder).glob("job_*"))


@pytest.mark.slow
async def test_honest_memory_passes(pair: Pair):
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        proof = await pair.prober.memory(advert(), memory_bytes=8 * MIB, parallel=2)
    assert proof.proven == 16 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda asked, right: structs.replace(right, states=right.states[:1]), "1 of 2"),
        (lambda asked, right: structs.replace(right, states=(right.states[0],) * 2), "lane 1"),
        (
            lambda asked, right: structs.replace(
                right,
                states=tuple((lane[0], *(canary.to_hex(7),) * 64) for lane in right.states),
            ),
            "lane 0",
        ),
        (
            lambda asked, right: structs.replace(right, challenge_hash="sha256:" + "0" * 64),
            "another challenge",
        ),
    ],
    ids=["a lane left out", "a lane copied", "states made up", "another challenge's answer"],
)
async def test_lies_about_cores_fail(pair: Pair, lie, why: str):
    async with AsyncExitStack() as stack:
        await pair.answer_with(stack, lie)
        with pytest.raises(LumarisError, match=why) as caught:
            await pair.prober.cores(advert(**SLOW), parallel=2)
    assert caught.value.code == "challenge_failed"


@pytest.mark.slow
async def test_a_claim_beyond_what_was_done_in_time_fails(pair: Pair):
    """Few rounds stand for a slow seller: its claim is a hundred times what it computed."""
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        real = pair.prober._challenge

        def fewer(seller, kind, parallel, *, rounds=0, memory_bytes=0):
            pieces = canary.stretches(parallel)
            return real(seller, kind, parallel, rounds=pieces, memory_bytes=memory_bytes)

        pair.prober._challenge = fewer  # type: ignore[method-assign]
        boast = advert(wasm_mfuel_s=1 << 40)
        ask = pair.prober._ask

        async def slowly(asked, to):
            answer, _ = await ask(asked, to)
            return answer, 1e6

        pair.prober._ask = slowly  # type: ignore[method-assign]
        with pytest.raises(LumarisError, match="too slow: the seller claims") as caught:
            await pair.prober.cores(boast, parallel=1)
    assert caught.value.code == "challenge_slow"


@pytest.mark.slow
async def test_a_wrong_fill_fails(pair: Pair):
    def lie(asked: Challenge, right: ChallengeAnswer) -> ChallengeAnswer:
        return structs.replace(right, states=(("ab" * 32,),))

    async with AsyncExitStack() as stack:
        await pair.answer_with(stack, lie)
        with pytest.raises(LumarisError, match="fill 0") as caught:
            await pair.prober.memory(advert(), memory_bytes=MIB)
    assert caught.value.code == "challenge_failed"


async def refusal(pair: Pair, data: bytes) -> str:
    """What the seller says to a document, in code."""
    stream = FramedStream(await pair.buyer.open_stream(SELLER.peer_id, CHALLENGE))
    try:
        with trio.fail_after(20):
            await stream.send(Kind.ENVELOPE, data)
            await stream.expect(Kind.ENVELOPE)
    except LumarisError as error:
        return error.code
    finally:
        await stream.aclose()
    return ""


@pytest.mark.slow
async def test_a_replayed_nonce_is_refused(pair: Pair):
    asked = pair.prober._challenge(SELLER.peer_id, "cores", 1, rounds=canary.stretches(1))
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        assert await refusal(pair, asked.data) == ""
        assert await refusal(pair, asked.data) == "replayed"
        assert await refusal(pair, asked.data) == "not_accepting", "a third within the minute"


def altered(pair: Pair, **fields: object) -> bytes:
    asked = pair.prober._challenge(SELLER.peer_id, "cores", 1, rounds=64).message
    return codec.sign(structs.replace(asked, **fields), BUYER, NETWORK).data


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"rounds": 65}, "malformed"),
        ({"rounds": 0}, "malformed"),
        ({"kind": "memory"}, "malformed"),
        ({"kind": "memory", "memory_bytes": MIB, "parallel": 17}, "malformed"),
        ({"parallel": 5}, "no_capacity"),
        ({"kind": "memory", "memory_bytes": 2 * GIB}, "no_capacity"),
        ({"seller": BUYER.peer_id}, "wrong_domain"),
        ({"certificate": certificate(BUYER, signer=BUYER)}, "not_certified"),
        ({"certificate": certificate(SELLER)}, "not_certified"),
        ({"issued_at": 1, "expires_at": 2}, "expired"),
        ({"expires_at": int(time.time()) + 9999}, "malformed"),
    ],
)
async def test_what_is_refused(pair: Pair, fields: dict[str, object], code: str):
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        assert await refusal(pair, altered(pair, **fields)) == code
    assert pair.challenges.counts == {code: 1}


async def test_without_the_wasm_tier_no_cores(pair: Pair):
    pair.challenges._wasm = None
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        assert await refusal(pair, altered(pair)) == "tier_unavailable"


async def test_while_the_owner_does_not_sell_nothing_is_proven(pair: Pair):
    pair.closed.append("paused")
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        for _ in range(4):  # and nothing is charged
            assert await refusal(pair, altered(pair)) == "not_accepting"
        pair.closed.clear()
        assert await refusal(pair, altered(pair, rounds=65)) == "malformed"


async def test_the_work_ends_in_time_and_nothing_of_it_is_sold_meanwhile(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    total, seen = pair.quotes.total, []

    async def endless(asked: Challenge) -> None:
        seen.append(pair.quotes.free.cpu_millis)
        with pytest.raises(LumarisError, match="no_capacity"), pair.quotes.aside(total):
            pass
        await trio.sleep_forever()

    monkeypatch.setattr("lumaris_node.challenges._WORK_S", 0.05)
    pair.challenges._cores = endless  # type: ignore[method-assign, assignment]
    async with pair.seller.serve(CHALLENGE, pair.challenges.serve):
        assert await refusal(pair, altered(pair, parallel=3)) == "challenge_failed"
    assert seen == [1000]
    assert pair.quotes.free == total


async def test_all_together_are_charged_by_what_they_took(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lumaris_node.challenges._WORK_S", 20.0)
    for _ in range(10):  # each could take all there is, and takes nothing
        with pair.challenges._charged():
            pass
    now = [time.monotonic()]
    monkeypatch.setattr("lumaris_node.challenges.time.monotonic", lambda: now[0])
    with pair.challenges._charged():
        now[0] += 10
    with pytest.raises(LumarisError, match="come first"), pair.challenges._charged():
        pass
    now[0] += 101
    with pair.challenges._charged():
        pass


async def test_a_silent_seller_is_no_proof(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lumaris.challenges._ANSWER_S_MAX", 0.05)

    async def silent(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    async with pair.seller.serve(CHALLENGE, silent):
        with pytest.raises(LumarisError) as caught:
            await pair.prober.cores(advert(**SLOW), parallel=1)
    assert caught.value.code == "challenge_failed"


def test_the_checker_counts_lanes():
    asked = Challenge(
        challenge="chl_" + "a" * 24,
        asker=BUYER.peer_id,
        seller=SELLER.peer_id,
        certificate=b"",
        kind="cores",
        parallel=2,
        rounds=64,
        nonce="0" * 32,
        issued_at=0,
        expires_at=1,
    )
    answer = ChallengeAnswer(
        challenge_hash="sha256:" + "0" * 64,
        seller=SELLER.peer_id,
        states=(),
        elapsed_ms=0,
        issued_at=0,
    )
    with pytest.raises(LumarisError, match="0 of 2"):
        check_cores(asked, answer)


async def test_a_short_name_is_refused(pair: Pair):
    with pytest.raises(LumarisError) as caught:
        await find_seller(pair.buyer, "abc")
    assert caught.value.code == "usage"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_shows_claim_and_proof(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
):
    asked: list[tuple[str, int]] = []

    class Answering:
        async def cores(self, advert: Advert, *, parallel: int) -> Proof:
            asked.append(("cores", parallel))
            return Proof(advert.seller, "cores", parallel, 2.0, 10**10, 9 * 10**9, parallel, b"")

        async def memory(self, advert: Advert, *, memory_bytes: int, parallel: int) -> Proof:
            asked.append(("memory", memory_bytes * parallel))
            size = memory_bytes * parallel
            return Proof(advert.seller, "memory", parallel, 1.0, size, size, 1, b"")

    @asynccontextmanager
    async def open_prober(profile: object) -> AsyncIterator[tuple[Answering, None]]:
        yield Answering(), None

    async def find(overlay: None, name: str) -> Advert:
        return advert()

    monkeypatch.setattr("lumaris.challenges.open_prober", open_prober)
    monkeypatch.setattr("lumaris.challenges.find_seller", find)
    words = ["--state", str(tmp_path), "challenge", SELLER.peer_id]
    words += ["--cores", "2", "--memory", "3GiB", *(["--json"] if as_json else [])]
    assert not root.main(words, standalone_mode=False)
    assert asked == [("cores", 2), ("memory", 3 * GIB)]
    said = capsys.readouterr().out
    if as_json:
        cores, memory = json.loads(said)["proofs"]
        assert (cores["claimed_fuel_s"], cores["proven_fuel_s"]) == (10**10, 9 * 10**9)
        assert memory["proven_bytes"] == memory["asked_bytes"] == 3 * GIB
    else:
        assert "9.00 Gfuel/s (90%)" in said
        assert "3 GiB" in said
