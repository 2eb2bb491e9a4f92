"""Witnesses of the log: peers that check that it only grows, and sign what they saw.

Their cosignatures make a fork of the log visible to all, and at a start their memory tells whether
this store is older than what was already shown. No trade waits for one.

The exchange with a witness runs where the overlay does; what is asked and what becomes of an answer
is decided here, where the store is.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import msgspec

from lumaris_coordinator.bounds import (
    COSIGNATURE_CLOCK_S,
    WITNESS_EXCHANGE_S,
    WITNESS_PLACES,
    WITNESS_ROUNDS_MAX,
)
from lumaris_coordinator.receipts import cosignatures, tree
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.store.port import Connection, first
from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol import codec, merkle, notes, witnessing
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import WITNESSES_MAX
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.messages.notice import CheckpointNotice
from lumaris_protocol.protocols import WITNESS
from lumaris_protocol.witnessing import Submission, WitnessAsk, WitnessReply

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_overlay.ports import OverlayStream

log = logging.getLogger(__name__)

OpenStream = Callable[[str, str], Awaitable["OverlayStream"]]
"""Open a stream to a peer (its id) for a protocol; raises LumarisError `unreachable`."""


@dataclass
class Gathered:
    """How a round went: who cosigned, and why others did not."""

    cosigned: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Highest:
    """What witnesses remember of the log: how many told something of it, the heads they cosigned,
    and which of the chosen ones hold a head of it that no key known here has signed."""

    answered: int
    heads: tuple[Checkpoint, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Cosigned:
    """A note that witnesses signed: its tree, and each witness's line."""

    point: Checkpoint
    lines: tuple[tuple[str, str], ...]


class Witnesses:
    """The coordinator's side of witnessing."""

    def __init__(self, context: Context, log: ReceiptLog) -> None:
        self._context, self._log = context, log
        # Why this log must not go on: a witness holds a head of ours that is not in it.
        self.behind = ""

    # --- asking ---

    async def known(self) -> tuple[str, ...]:
        """The witnesses to ask: those of the settings, then those of the newest heads that are in
        the best standing."""
        settings = self._context.settings
        found = await self._context.store.read(
            lambda connection: cosignatures.standing(connection, currency=settings.currency)
        )
        return tuple(dict.fromkeys((*settings.witnesses, *found)))[:WITNESSES_MAX]

    async def ask(self, peers: Iterable[str]) -> dict[str, WitnessAsk]:
        """What to send to each peer: the newest head, with the proof from what it cosigned last."""
        wanted = tuple(dict.fromkeys(peers))[:WITNESSES_MAX]
        return await self._context.store.read(
            lambda connection: {
                peer: self._ask(connection, cosignatures.last_size(connection, peer))
                for peer in wanted
            }
        )

    async def take(
        self, answers: Mapping[str, WitnessReply], gathered: Gathered
    ) -> dict[str, WitnessAsk]:
        """Keep what peers cosigned and note the rest; what to send to those that know another size
        of our log than we thought."""
        again: dict[str, WitnessAsk] = {}
        for peer, answer in answers.items():
            try:
                following = await self._take(peer, answer)
            except LumarisError as error:
                gathered.refused[peer] = error.code
                continue
            if following is not None:
                again[peer] = following
            else:
                gathered.cosigned.append(peer)
        return again

    async def gather(self, open_stream: OpenStream, peers: Iterable[str]) -> Gathered:
        """Have peers cosign the newest head. Never raises for what peers do."""
        gathered = Gathered()
        asks = await self.ask(peers)
        for _ in range(WITNESS_ROUNDS_MAX):
            answers = await exchange(open_stream, asks, gathered)
            asks = await self.take(answers, gathered)
            if not asks:
                break
        gathered.refused.update(dict.fromkeys(asks, "elsewhere"))
        return gathered

    def _ask(self, connection: Connection, old: int) -> WitnessAsk:
        head = self._log.head(connection)
        path: Sequence[bytes] = ()
        if 0 < old < head.size:
            path = self._log.proofs.consistency(connection, old, head.size)
        found = Submission(old, tuple(path), head.note)
        return WitnessAsk(op="cosign", body=witnessing.encode_submission(found))

    async def _take(self, peer: str, answer: WitnessReply) -> WitnessAsk | None:
        """None when it cosigned. Raises LumarisError for an answer that leads nowhere."""
        if answer.state == "cosigned":
            await self.add(answer.note, only=peer)
            return None
        if not answer.note:
            if answer.state == "elsewhere":
                return await self._context.store.read(lambda connection: self._ask(connection, 0))
            raise RefusedError("malformed", "The witness gave no reason.")
        point = merkle.parse_checkpoint(notes.parse(answer.note).text)
        if point.origin != self._log.origin:
            raise EnvelopeError("wrong_domain", "The note is of another log.")
        if await self._context.store.read(lambda connection: self._compare(connection, point)):
            # Only with our own signature it says something of us.
            merkle.open_checkpoint(answer.note, *self._log.trusted_keys)
            await self._require(point)
        if answer.state == "inconsistent":
            raise RefusedError("log_behind", "A witness finds the log inconsistent.")
        return await self._context.store.read(lambda connection: self._ask(connection, point.size))

    # --- taking in ---

    async def add(self, note: str, *, only: str | None = None) -> dict[str, int]:
        """Keep the cosignatures of a note of ours: {size, kept}.

        Raises EnvelopeError for a note or line that does not hold, and LumarisError: `not_found`
        for a head never signed here and without a known witness's line, `log_behind` for a head of
        ours that this log does not have, `busy`.
        """
        now = self._context.now()
        found = self._open(note, now, await self._members(note, only))
        if only is not None and not found.lines:
            raise EnvelopeError("bad_signature", "The witness did not cosign the note.")
        await self._require(found.point)
        kept = await self._context.store.submit(
            lambda connection: self._keep(connection, found, now)
        )
        return {"size": found.point.size, "kept": kept}

    async def _members(self, note: str, only: str | None) -> frozenset[str]:
        """Whose lines of a note are worth a look: members' here, or chosen witnesses'."""
        lines = notes.parse(note).lines[: WITNESSES_MAX + 1]
        named = {line.name.rpartition("/")[2] for line in lines}
        if only is not None:
            return frozenset(named & {only})
        chosen = named.intersection(self._context.settings.witnesses)
        return await self._context.store.read(
            lambda connection: frozenset(
                name for name in named if name in chosen or _is_member(connection, name)
            )
        )

    def _open(self, note: str, now: int, known: frozenset[str]) -> _Cosigned:
        """Take a note apart and verify the lines of the witnesses that are `known`."""
        parsed = notes.parse(note)
        point = merkle.open_checkpoint(note, *self._log.trusted_keys)
        if point.origin != self._log.origin:
            raise EnvelopeError("wrong_domain", "The note is of another log.")
        lines, named = [], 0
        for line in parsed.lines:
            key = notes.witness_of(self._log.network, line.name)
            peer = line.name.rpartition("/")[2]
            if key is None or key.id != line.key_id:
                continue
            named += 1
            if peer not in known:
                continue
            at = notes.verify(notes.Note(parsed.text, (line,)), key)
            if at is None or at > now + COSIGNATURE_CLOCK_S:
                raise EnvelopeError("not_yet_valid", "A cosignature is dated in the future.")
            lines.append((peer, notes.line_of(line)))
        if not named:
            raise EnvelopeError("bad_signature", "No witness of this network cosigned the note.")
        return _Cosigned(point, tuple(lines[:WITNESSES_MAX]))

    def _keep(self, connection: Connection, found: _Cosigned, now: int) -> int:
        """An operation. Only heads that were published are cosigned, by peers that we know."""
        size, settings = found.point.size, self._context.settings
        if tree.head_at(connection, size) is None:
            raise LumarisError("not_found", "No such head of the log was published.")
        kept = 0
        for peer, line in found.lines:
            if peer not in settings.witnesses and not _is_member(connection, peer):
                continue
            kept += cosignatures.add(
                connection,
                size=size,
                witness=peer,
                line=line,
                now=now,
                chosen=settings.witnesses,
                room=WITNESS_PLACES,
                currency=settings.currency,
            )
        return kept

    # --- what witnesses remember ---

    async def require_current(self, highest: Highest) -> None:
        """At start: this log holds everything that witnesses were shown.

        Raises LumarisError `log_behind`, also when a chosen witness holds a head that was signed
        with a key unknown here, and when fewer witnesses told something of the log than the
        setting `witnesses_required` asks for.
        """
        if highest.unknown:
            raise LumarisError(
                "log_behind",
                f"The witness {highest.unknown[0]} holds a head of this log that no key of ours"
                " has signed.",
                hint="Bring back the newest keys: this state is older than what was shown.",
            )
        for point in highest.heads:
            await self._require(point)
        required = self._context.settings.witnesses_required
        if highest.answered < required:
            raise LumarisError(
                "log_behind",
                f"{highest.answered} witnesses told of a head of this log,"
                f" {required} are required.",
                hint="Start them first; while they have seen none, lower witnesses_required.",
            )

    async def _require(self, point: Checkpoint) -> None:
        """A head with our own signature must be one of this log's. Raises LumarisError."""
        reason = await self._context.store.read(lambda connection: self._compare(connection, point))
        if reason:
            self.behind = reason
            log.critical("the receipts log is not what its key signed before: %s", reason)
            raise LumarisError("log_behind", reason)

    def _compare(self, connection: Connection, point: Checkpoint) -> str:
        size = self._log.head(connection).size
        if point.size > size:
            return f"A witness saw {point.size} leaves of this log; there are {size} here."
        if self._log.proofs.root(connection, point.size) != point.root:
            return f"A witness saw other leaves among the first {point.size} of this log."
        return ""

    async def memory(self) -> Memory:
        """By what answers about the log are judged now."""
        context, log = self._context, self._log
        size = await context.store.read(lambda connection: log.head(connection).size)
        chosen = context.settings.witnesses
        return Memory(log.network, log.trusted_keys, log.keys, empty=not size, chosen=chosen)

    # --- telling everybody ---

    async def notice(self) -> bytes:
        """The newest head with its cosignatures, signed for the gossip of notices."""
        now = self._context.now()
        note = await self._context.store.read(self._note)
        message = CheckpointNotice(seq=now, checkpoint=note, issued_at=now)
        return codec.sign(message, self._context.key, self._context.settings.network).data

    def _note(self, connection: Connection) -> str:
        return cosignatures.signed_note(connection, self._log.head(connection))

    async def checkpoint(self) -> str:
        """The newest head with its cosignatures."""
        return await self._context.store.read(self._note)


async def exchange(
    open_stream: OpenStream, asks: Mapping[str, WitnessAsk], gathered: Gathered | None = None
) -> dict[str, WitnessReply]:
    """Send each peer its request and wait for the answers, a bounded time, all at once.

    Belongs to the event loop of `open_stream`. Who does not answer is noted in `gathered`.
    """
    answers: dict[str, WitnessReply] = {}

    async def one(peer: str, request: WitnessAsk) -> None:
        reason = "timeout"
        with anyio.move_on_after(WITNESS_EXCHANGE_S):
            try:
                answers[peer] = await _exchange(await open_stream(peer, WITNESS), request)
                return
            except LumarisError as error:
                reason = error.code
            except Exception as error:  # a stream of any overlay may break in its own way
                log.debug("witness %s: %r", peer, error)
                reason = "unreachable"
        if gathered is not None:
            gathered.refused[peer] = reason

    async with anyio.create_task_group() as tasks:
        for peer, request in asks.items():
            tasks.start_soon(one, peer, request)
    return answers


async def _exchange(stream: OverlayStream, request: WitnessAsk) -> WitnessReply:
    framed = FramedStream(stream)
    try:
        await framed.send(Kind.HEADER, msgspec.json.encode(request))
        return await framed.expect_header(WitnessReply)
    finally:
        await framed.aclose()


@dataclass(frozen=True)
class Memory:
    """By what an answer about the log is judged: the keys whose word counts, those that ever signed
    (revoked ones among them), whether the log here is empty, and the witnesses of the settings."""

    network: str
    keys: tuple[bytes, ...]
    ever: tuple[bytes, ...] = ()
    empty: bool = False
    chosen: tuple[str, ...] = ()


async def highest_seen(open_stream: OpenStream, peers: Iterable[str], memory: Memory) -> Highest:
    """Ask witnesses for the newest head of the log that each cosigned. Never raises for what they
    do: only heads with the log's own signature and the witness's cosignature count. One that has
    seen nothing tells something only of a log that is empty, and where witnesses were chosen only
    those are counted: a stranger with an old head must not vouch for an old log."""
    wanted = tuple(dict.fromkeys(peers))[:WITNESSES_MAX]
    answers = await exchange(open_stream, dict.fromkeys(wanted, WitnessAsk(op="latest")))
    heads, unknown, answered = [], [], 0
    for peer, answer in sorted(answers.items()):
        counts = peer in memory.chosen or not memory.chosen
        if not answer.note:
            answered += counts and memory.empty
            continue
        try:
            _cosigned(answer.note, peer, memory.network)
            heads.append(merkle.open_checkpoint(answer.note, *memory.keys))
            answered += counts
        except (EnvelopeError, ValueError) as error:
            log.warning("witness %s shows no head of ours: %s", peer, error)
            # Anybody can become a witness and show anything: only those that were chosen stop us.
            if peer in memory.chosen and _is_foreign(answer.note, peer, memory):
                unknown.append(peer)
    heads.sort(key=lambda point: -point.size)
    return Highest(answered, tuple(heads), tuple(unknown))


def _cosigned(note: str, peer: str, network: str) -> Checkpoint:
    """What a witness signed of the network's log, whoever signed it for the log."""
    parsed = notes.parse(note)
    point = merkle.parse_checkpoint(parsed.text)
    if point.origin != notes.log_origin(network):
        raise EnvelopeError("wrong_domain", "The note is of another log.")
    if notes.verify(parsed, notes.witness_key(network, peer)) is None:
        raise EnvelopeError("bad_signature", "The witness did not cosign the note.")
    return point


def _is_foreign(note: str, peer: str, memory: Memory) -> bool:
    """Whether the witness cosigned a head of the log that none of its keys ever signed."""
    try:
        _cosigned(note, peer, memory.network)
    except (EnvelopeError, ValueError):
        return False
    try:
        merkle.open_checkpoint(note, *memory.ever)
    except EnvelopeError:
        return True
    return False


def _is_member(connection: Connection, peer: str) -> bool:
    row = first(connection, "SELECT revoked_at FROM peer WHERE peer = ?", (peer,))
    return row is not None and not row[0]
