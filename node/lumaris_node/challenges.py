"""Proving what the advert claims: members may ask for work that only real cores or memory can do.

The work comes out of what is free, one challenge at a time, and the answer is signed. Nothing here
judges speed: the asker looks at its own clock.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from lumaris_node.executors.port import Executor, JobLimits, JobSpec
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import StrangerLog, first_of
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import agreements, canary, codec
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.ids import digest, make_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    CHALLENGE_FILLS_MAX,
    CHALLENGE_LIFETIME_S,
    CHALLENGE_STATES_MAX,
    CLOCK_SKEW_S,
    MIB,
)
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.challenge import Challenge, ChallengeAnswer

log = logging.getLogger(__name__)

# A peer gets one a minute after its first two; all of them together, a tenth of the time, counted
# in milliseconds of work.
_PER_S_PER_PEER, _BURST_PER_PEER = 1 / 60, 2
_MS_PER_S, _BURST_MS = 100, 20_000
_PEERS_MAX = 1024
_READ_S = 10.0
_WORK_S = 5.0  # those who ask size their work so that it takes less than half of this
_SEEN_MAX = 4096
_LANE_BYTES = 64 * MIB
_TAG_CHARS = 64


@dataclass(frozen=True)
class Belonging:
    """Whose word makes a peer a member."""

    network: str
    coordinators: Set[str]


class Challenges:
    """Serves `/lumaris/challenge/1`. `counts` says how requests ended, for the owner."""

    def __init__(
        self,
        key: KeyPair,
        belonging: Belonging,
        *,
        wasm: Executor | None,
        folder: Path,
        aside: Callable[[Resources], AbstractContextManager[None]],
        selling: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        """`wasm` is None where that tier is not offered: then no cores can be proven.

        `aside` keeps what the work takes from being sold meanwhile, or raises `no_capacity`.
        """
        self._key, self._belonging, self._wasm = key, belonging, wasm
        self._folder, self._aside, self._clock = folder, aside, clock
        self._selling = selling
        self._each = TokenBuckets(
            per_s=_PER_S_PER_PEER, burst=_BURST_PER_PEER, names_max=_PEERS_MAX
        )
        self._all = TokenBuckets(per_s=_MS_PER_S, burst=_BURST_MS, names_max=1)
        self._seen: dict[str, float] = {}
        self._working = False
        self._strangers = StrangerLog(log)
        self.counts: dict[str, int] = {}

    async def serve(self, stream: OverlayStream) -> None:
        """One challenge on one stream; every refusal is told and counted."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_READ_S):
                asked = self._open(await framed.expect(Kind.ENVELOPE), stream.peer)
            answer = await self._answer(asked)
            with trio.fail_after(_READ_S):
                await framed.send(Kind.ENVELOPE, answer.data)
            self._count("answered")
        except LumarisError as error:
            self._count(error.code)
            self._strangers.note(stream.peer, error.code, error.message)
            await framed.refuse(error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._count("lapsed")
        finally:
            await framed.aclose()

    def _open(self, data: bytes, peer: str) -> Signed[Challenge]:
        """The challenge, when it is a new one from a member for us. Raises LumarisError."""
        now, network = self._clock(), self._belonging.network
        if not self._selling():
            raise RefusedError("not_accepting", "The owner sells nothing now.")
        if not self._each.take(peer, time.monotonic()):
            raise RefusedError("not_accepting", "One challenge a minute.")
        signed = codec.open_signed(data, Challenge, network=network, signer=peer)
        asked = signed.message
        if asked.seller != self._key.peer_id or asked.asker != peer:
            raise RefusedError("wrong_domain", "The challenge names other parties.")
        codec.check_times(
            issued_at=asked.issued_at, expires_at=asked.expires_at, now=now, what="challenge"
        )
        if asked.expires_at > now + CHALLENGE_LIFETIME_S + CLOCK_SKEW_S:
            raise RefusedError("malformed", "The challenge asks to be remembered too long.")
        agreements.open_certificate(
            asked.certificate,
            network=network,
            coordinators=self._belonging.coordinators,
            peer=peer,
            now=now,
        )
        self._check_new(asked, now)
        return signed

    def _check_new(self, asked: Challenge, now: float) -> None:
        old = now - 2 * (CHALLENGE_LIFETIME_S + CLOCK_SKEW_S)
        while self._seen and (
            len(self._seen) >= _SEEN_MAX or next(iter(self._seen.values())) < old
        ):
            del self._seen[next(iter(self._seen))]
        if asked.nonce in self._seen:
            raise RefusedError("replayed", "A challenge with this nonce was here before.")
        self._seen[asked.nonce] = now

    async def _answer(self, asked: Signed[Challenge]) -> Signed[ChallengeAnswer]:
        message = asked.message
        takes = self._takes(message)
        began = trio.current_time()
        with self._aside(takes), self._charged():
            try:
                with trio.fail_after(_WORK_S):
                    work = self._cores if message.kind == "cores" else self._memory
                    states, fuel = await work(message)
            except trio.TooSlowError:
                raise RefusedError("challenge_failed", "The work did not end in time.") from None
        answer = ChallengeAnswer(
            challenge_hash=asked.hash,
            seller=self._key.peer_id,
            states=states,
            fuel=fuel,
            elapsed_ms=int((trio.current_time() - began) * 1000),
            issued_at=int(self._clock()),
        )
        return codec.sign(answer, self._key, self._belonging.network)

    @contextmanager
    def _charged(self) -> Iterator[None]:
        """One at a time, and what it took of the time for all. Raises RefusedError."""
        most_ms, began = int(_WORK_S * 1000), time.monotonic()
        if self._working or not self._all.take("", began, most_ms):
            raise RefusedError("not_accepting", "Other challenges come first; try later.")
        self._working = True
        try:
            yield
        finally:
            self._working = False
            now = time.monotonic()
            used_ms = min(most_ms, int((now - began) * 1000))
            self._all.take("", now, used_ms - most_ms)  # gives the rest back

    def _takes(self, asked: Challenge) -> Resources:
        """What the work needs. Raises LumarisError for work that no challenge asks for."""
        if asked.kind == "cores":
            pieces = canary.stretches(asked.parallel)
            if self._wasm is None:
                raise RefusedError("tier_unavailable", "Cores are proven on the wasm tier.")
            if not asked.rounds or asked.rounds % pieces or pieces >= CHALLENGE_STATES_MAX:
                raise EnvelopeError("malformed", f"The rounds are no multiple of {pieces}.")
            memory_bytes = asked.parallel * _LANE_BYTES
        else:
            if not asked.memory_bytes:
                raise EnvelopeError("malformed", "The challenge asks for no memory.")
            if asked.parallel > CHALLENGE_FILLS_MAX:
                raise EnvelopeError("malformed", f"At most {CHALLENGE_FILLS_MAX} fills at once.")
            memory_bytes = asked.parallel * asked.memory_bytes
        return Resources(cpu_millis=asked.parallel * 1000, memory_bytes=memory_bytes)

    async def _cores(self, asked: Challenge) -> tuple[tuple[tuple[str, ...], ...], int]:
        """The lanes' states, and the fuel that they took together."""
        wasm = self._wasm
        assert wasm is not None, "checked before"
        image = await self._canary(wasm)
        lanes: list[tuple[str, ...]] = [()] * asked.parallel
        fuels: list[int] = [0] * asked.parallel

        async def one(lane: int) -> None:
            lanes[lane], fuels[lane] = await self._lane(wasm, image, asked, lane)

        await _each(one, asked.parallel)
        return tuple(lanes), sum(fuels)

    async def _canary(self, wasm: Executor) -> str:
        """The guest's digest, once the tier has it."""
        import wasmtime

        code = bytes(await trio.to_thread.run_sync(wasmtime.wat2wasm, canary.guest_text()))
        image = digest(code)
        if not await wasm.has_image(image):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            source = self._folder / "canary.wasm"
            source.write_bytes(code)
            await wasm.add_image(image, source)
        return image

    async def _lane(
        self, wasm: Executor, image: str, asked: Challenge, lane: int
    ) -> tuple[tuple[str, ...], int]:
        pieces = canary.stretches(asked.parallel)
        job = make_id("job", os.urandom(15))
        root = self._folder / job
        output = bytearray()

        async def keep(_stream: str, data: bytes) -> None:
            output.extend(data)

        limits = JobLimits(
            cpu_millis=1000,
            memory_bytes=MIB,
            disk_bytes=MIB,
            wall_s=_WORK_S,
            fuel=0,
            log_bytes=canary.STATE_BYTES * (pieces + 1),
            output_bytes=0,
            output_files=0,
        )
        order = canary.order(
            canary.first_state(asked.nonce, lane), rounds=asked.rounds, pieces=pieces
        )
        try:
            inputs, outputs = _folders(root)
            (inputs / canary.ORDER_FILE).write_bytes(order)
            handle = await wasm.prepare(
                JobSpec(job, image, ("canary",), {}, inputs, outputs, limits)
            )
            try:
                await wasm.start(handle, keep)
                outcome = await wasm.wait(handle)
            finally:
                await wasm.destroy(handle)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        if outcome.reason != "succeeded":
            raise LumarisError("platform_error", f"A lane ended with {outcome.reason}.")
        size = canary.STATE_BYTES
        states = [output[at : at + size].hex() for at in range(0, len(output), size)]
        return tuple(states), outcome.usage.fuel

    async def _memory(self, asked: Challenge) -> tuple[tuple[tuple[str, ...], ...], int]:
        """The fills' tags; all are held at the same time, each by a process of its own."""
        tags: list[tuple[str, ...]] = [()] * asked.parallel

        async def one(lane: int) -> None:
            tags[lane] = (await _fill(asked.nonce, lane, asked.memory_bytes),)

        await _each(one, asked.parallel)
        return tuple(tags), 0

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1


async def _fill(nonce: str, lane: int, size_bytes: int) -> str:
    """The tag of one fill. Raises LumarisError `platform_error`, as when memory is short."""
    password, salt = canary.fill_seed(nonce, lane)
    order = {"password": password.hex(), "salt": salt.hex(), "bytes": size_bytes}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "lumaris_node.challenge_fill"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said = b""
    try:
        # Its standard input stays open: it ends when that does.
        await process.stdin.send_all(json.dumps(order).encode() + b"\n")
        async for part in process.stdout:
            said += part[:_TAG_CHARS]
            if len(said) >= _TAG_CHARS:
                break
    except trio.BrokenResourceError:
        pass  # it has ended; what it said is judged below
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()
    if len(said) != _TAG_CHARS:
        raise LumarisError("platform_error", "A fill of memory failed.")
    return said.decode("ascii", "replace")


def _folders(root: Path) -> tuple[Path, Path]:
    inputs, outputs = root / "in", root / "out"
    for folder, mode in ((root, 0o711), (inputs, 0o755), (outputs, 0o777)):
        folder.mkdir(parents=True)
        folder.chmod(mode)
    return inputs, outputs


async def _each(work: Callable[[int], Awaitable[None]], count: int) -> None:
    """Run the lanes together; the first LumarisError alone ends them all."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            for lane in range(count):
                nursery.start_soon(work, lane)
    except* LumarisError as group:
        failure = first_of(group)
    if failure is not None:
        raise failure
