"""Having a seller prove its cores and its memory, measured by our own clock.

What comes back is checked in part: of every lane its beginning and one stretch drawn after the
answer arrived, of the memory fills one. So a seller that leaves out half of the work passes with
one chance in two for each lane, and one that leaves out a little gains as little.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import trio

from lumaris import membership
from lumaris.coordinator import open_link
from lumaris.profile import Profile
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.links import open_links
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.supervisor import attach_or_spawn
from lumaris_protocol import canary, codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.ids import make_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    CHALLENGE_FILLS_MAX,
    CHALLENGE_PARALLEL_MAX,
    CHALLENGE_ROUNDS_MAX,
    GIB,
    MIB,
)
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.challenge import Challenge, ChallengeAnswer
from lumaris_protocol.protocols import CHALLENGE

# Long beside starting the lanes, and less than half of the 5 s that a seller works for a stranger.
_TARGET_S = 2.0
# Used where the advert names no speed: what a slow machine does.
_MFUEL_S_DEFAULT = 5_000
# A fill takes about a second a GiB.
_FILL_BYTES_MAX = 2 * GIB
_ANSWER_S_MAX = 30.0
_LIFETIME_S = 120
_FIND_S = 6.0
_SUFFIX_CHARS_MIN = 6
# A seller shares its machine with its owner and starts its lanes meanwhile; a claim of twice what
# is there is found out.
RATE_SHARE_MIN = 0.5
# How much longer than our own fill one of theirs may take, with all of them at once on their cores.
_FILL_FACTOR, _FILL_SLACK_S = 4.0, 2.0


@dataclass(frozen=True)
class Proof:
    """What a seller claims or was asked, and what it did while we watched. Rates are per second."""

    seller: str
    kind: Literal["cores", "memory"]
    parallel: int
    elapsed_s: float
    claimed: int  # fuel/s of all lanes by its advert, or the bytes that we asked for
    proven: int
    checked: int  # lanes looked into
    answer: bytes  # the seller's signed answer

    @property
    def share(self) -> float:
        """Proven over claimed."""
        return self.proven / self.claimed if self.claimed else 1.0


class Prober:
    """Challenges sellers as one member. `clock` dates documents; durations are trio's."""

    def __init__(
        self,
        overlay: Overlay,
        key: KeyPair,
        network: str,
        certificate: Callable[[], bytes],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._overlay, self._key, self._network = overlay, key, network
        self._certificate, self._clock = certificate, clock

    async def cores(self, advert: Advert, *, parallel: int) -> Proof:
        """Have `parallel` cores compute for about two seconds.

        Raises LumarisError `challenge_failed` for wrong work, `challenge_slow` for work that took
        longer than the claim allows, or the refusal.
        """
        each = advert.benchmarks.get("wasm_mfuel_s", 0) * 1_000_000
        pieces = canary.stretches(parallel)
        target = (each or _MFUEL_S_DEFAULT * 1_000_000) * _TARGET_S / canary.FUEL_PER_ROUND
        rounds = max(1, min(int(target), CHALLENGE_ROUNDS_MAX) // pieces) * pieces
        asked = self._challenge(advert.seller, "cores", parallel, rounds=rounds)
        answer, elapsed_s = await self._ask(asked, advert)
        await trio.to_thread.run_sync(check_cores, asked.message, answer.message)
        proof = Proof(
            seller=advert.seller,
            kind="cores",
            parallel=parallel,
            elapsed_s=round(elapsed_s, 3),
            claimed=each * parallel,
            proven=int(parallel * rounds * canary.FUEL_PER_ROUND / elapsed_s),
            checked=parallel,
            answer=answer.data,
        )
        if proof.share < RATE_SHARE_MIN:
            raise LumarisError(
                "challenge_slow",
                f"The answer is right but too slow: the seller claims {proof.claimed / 1e9:.2f}"
                f" Gfuel/s and did {proof.proven / 1e9:.2f}, {proof.share:.0%} of it.",
            )
        return proof

    async def memory(self, advert: Advert, *, memory_bytes: int, parallel: int = 1) -> Proof:
        """Have `parallel` fills of `memory_bytes` held at once; one of them is done again here.

        Raises as `cores` does.
        """
        asked = self._challenge(advert.seller, "memory", parallel, memory_bytes=memory_bytes)
        answer, elapsed_s = await self._ask(asked, advert)
        ours_s = await trio.to_thread.run_sync(check_memory, asked.message, answer.message)
        if elapsed_s > ours_s * _FILL_FACTOR + _FILL_SLACK_S:
            raise LumarisError(
                "challenge_slow",
                f"The answer is right but too slow: {parallel} fills of {memory_bytes} bytes took"
                f" {elapsed_s:.1f} s, and one took {ours_s:.1f} s here.",
            )
        return Proof(
            seller=advert.seller,
            kind="memory",
            parallel=parallel,
            elapsed_s=round(elapsed_s, 3),
            claimed=memory_bytes * parallel,
            proven=memory_bytes * parallel,
            checked=1,
            answer=answer.data,
        )

    def _challenge(
        self,
        seller: str,
        kind: Literal["cores", "memory"],
        parallel: int,
        *,
        rounds: int = 0,
        memory_bytes: int = 0,
    ) -> Signed[Challenge]:
        most = CHALLENGE_PARALLEL_MAX if kind == "cores" else CHALLENGE_FILLS_MAX
        if not 1 <= parallel <= most:
            raise LumarisError("usage", f"1 to {most} can be asked for at once.")
        if kind == "memory" and not MIB <= memory_bytes <= _FILL_BYTES_MAX:
            raise LumarisError("usage", "One fill is 1 MiB to 2 GiB.")
        now = int(self._clock())
        message = Challenge(
            challenge=make_id("challenge", os.urandom(15)),
            asker=self._key.peer_id,
            seller=seller,
            certificate=self._certificate(),
            kind=kind,
            parallel=parallel,
            rounds=rounds,
            memory_bytes=memory_bytes,
            nonce=secrets.token_hex(16),
            issued_at=now,
            expires_at=now + _LIFETIME_S,
        )
        return codec.sign(message, self._key, self._network)

    async def _ask(
        self, asked: Signed[Challenge], advert: Advert
    ) -> tuple[Signed[ChallengeAnswer], float]:
        """The answer and how long it took on our clock, once a stream was there."""
        seller = asked.message.seller
        stream = FramedStream(
            await self._overlay.open_stream(seller, CHALLENGE, addresses=advert.addresses)
        )
        began = trio.current_time()
        try:
            with trio.fail_after(_ANSWER_S_MAX):
                await stream.send(Kind.ENVELOPE, asked.data)
                data = await stream.expect(Kind.ENVELOPE)
            elapsed_s = trio.current_time() - began
        except trio.TooSlowError:
            raise LumarisError(
                "challenge_failed", f"The seller did not answer within {_ANSWER_S_MAX:.0f} s."
            ) from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise LumarisError("unreachable", f"{seller} went away.") from None
        finally:
            await stream.aclose()
        answer = codec.open_signed(data, ChallengeAnswer, network=self._network, signer=seller)
        if answer.message.challenge_hash != asked.hash or answer.message.seller != seller:
            raise _failed("it answers another challenge")
        return answer, elapsed_s


def check_cores(asked: Challenge, answer: ChallengeAnswer) -> None:
    """Every lane's beginning and one stretch of it, drawn now. Blocks for seconds.

    Raises LumarisError `challenge_failed`.
    """
    if len(answer.states) != asked.parallel:
        raise _failed(f"it computed {len(answer.states)} of {asked.parallel} lanes")
    pieces = canary.stretches(asked.parallel)
    for lane, states in enumerate(answer.states):
        if not canary.check_lane(
            states,
            nonce=asked.nonce,
            lane=lane,
            rounds=asked.rounds,
            parallel=asked.parallel,
            stretch=secrets.randbelow(pieces),
        ):
            raise _failed(f"lane {lane} is not what the work gives")


def check_memory(asked: Challenge, answer: ChallengeAnswer) -> float:
    """One fill, drawn now and done again; how many seconds it took. Blocks.

    Raises LumarisError `challenge_failed`.
    """
    from nacl.pwhash import argon2id

    if len(answer.states) != asked.parallel or any(len(tags) != 1 for tags in answer.states):
        raise _failed(f"it filled {len(answer.states)} of {asked.parallel}")
    lane = secrets.randbelow(asked.parallel)
    password, salt = canary.fill_seed(asked.nonce, lane)
    began = time.perf_counter()
    tag = argon2id.kdf(32, password, salt, opslimit=1, memlimit=asked.memory_bytes)
    if answer.states[lane][0] != tag.hex():
        raise _failed(f"fill {lane} is not what the work gives")
    return time.perf_counter() - began


@asynccontextmanager
async def open_prober(profile: Profile) -> AsyncIterator[tuple[Prober, Overlay]]:
    """A prober on the profile's own overlay process. Raises LumarisError."""
    key = load_or_create_key(profile.key_file)
    link = open_link(profile)
    try:
        standing = await membership.enter(link, key, profile)
        async with (
            attach_or_spawn(membership.overlay_config(profile, standing)) as inner,
            open_links(inner, listen=None, answer=False) as overlay,
        ):
            standing = await membership.present(overlay, link, key, profile, standing)
            network, certificate = standing.info.network, standing.certificate
            yield Prober(overlay, key, network, lambda: certificate), overlay
    finally:
        with trio.CancelScope(shield=True):
            await link.aclose()


async def find_seller(overlay: Overlay, name: str) -> Advert:
    """The advert of the one seller whose peer id ends with `name`; waits for one to be known.

    Raises LumarisError `not_found`, `usage`.
    """
    if len(name) < _SUFFIX_CHARS_MIN:
        raise LumarisError("usage", f"Write at least the last {_SUFFIX_CHARS_MIN} characters.")
    with trio.move_on_after(_FIND_S):
        async with overlay.adverts() as events:
            async for event in events:
                if event.envelope is not None and event.seller.endswith(name):
                    try:
                        payload = envelope.decode(event.envelope).payload
                        return codec.decode_payload(payload, Advert)
                    except EnvelopeError:
                        continue
    raise LumarisError(
        "not_found",
        f"No seller is known whose id ends with {name}.",
        hint="`lumaris offers` lists sellers.",
    )


def _failed(why: str) -> LumarisError:
    return LumarisError("challenge_failed", f"The seller's answer is wrong: {why}.")
