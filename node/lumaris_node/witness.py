"""Watching the coordinator's receipts log: it may only grow, and must be the same for everybody.

What was seen is on disk before it is signed: a witness that forgot could sign two histories.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.private_files import write_private_file
from lumaris_overlay.tasks import StrangerLog
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import codec, coordinator_api, keys, merkle, notes, witnessing
from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import KIB
from lumaris_protocol.messages.notice import CheckpointNotice
from lumaris_protocol.witnessing import Record, Submission, WitnessAsk, WitnessReply

log = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME = "witness.json"
# Evidence is eight pairs of notes of 8 kB, and what was seen is 96 short ones.
_FILE_BYTES_MAX = 512 * KIB
_EXCHANGE_S = 10.0
# Each costs a signature and a file: an honest log asks once a minute, and again when it must.
_PER_S_PER_PEER, _BURST_PER_PEER = 0.2, 10
_PER_S, _BURST = 2, 50
_PEERS_MAX = 1_024
# Without the overlay a head is fetched this often; all nodes of a large market are 30 requests/s.
_FETCH_S = 900.0
_FIRST_FETCH_S = 60.0


class Link(Protocol):
    """The line to the coordinator."""

    async def call(self, request: Request[T]) -> T:
        """Raises LumarisError."""
        ...


class Witness:
    """Serves `/lumaris/witness/1`, and fetches the log's head when nobody brings it."""

    def __init__(
        self,
        key: KeyPair,
        *,
        network: str,
        folder: Path,
        coordinators: Callable[[], frozenset[str]],
        clock: Callable[[], float],
    ) -> None:
        """`coordinators` are the peer ids whose keys may sign the log."""
        self._key, self._network, self._clock = key, network, clock
        self._path, self._coordinators = folder / FILE_NAME, coordinators
        self._name = notes.witness_key(network, key.peer_id).name
        self._each = TokenBuckets(
            per_s=_PER_S_PER_PEER, burst=_BURST_PER_PEER, names_max=_PEERS_MAX
        )
        self._all = TokenBuckets(per_s=_PER_S, burst=_BURST, names_max=1)
        # Many strangers must not take the turns of the log itself.
        self._log_itself = TokenBuckets(per_s=_PER_S, burst=_BURST, names_max=1)
        self._strangers = StrangerLog(log)
        self._record = self._load()

    # --- what others ask ---

    async def serve(self, stream: OverlayStream) -> None:
        """One request on one stream. Anybody may bring a checkpoint: its signature counts."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_EXCHANGE_S):
                asked = await framed.expect_header(WitnessAsk)
                by_log = stream.peer in self._coordinators()
                self._admit(stream.peer, by_log=by_log)
                answer = self._answer(asked, by_log=by_log)
                await framed.send(Kind.HEADER, msgspec.json.encode(answer))
        except LumarisError as error:
            self._strangers.note(stream.peer, error.code, error.message)
            await framed.refuse(error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("witness request lapsed peer=%s", stream.peer)
        finally:
            await framed.aclose()

    def observe(self, note: str) -> None:
        """A checkpoint that somebody showed: a second history is kept as evidence.

        Raises EnvelopeError for one that the log did not sign.
        """
        self._save(witnessing.observe(self._held(), note, keys=self._keys()))

    def observe_notice(self, envelope: bytes) -> None:
        """A CheckpointNotice of the gossip. Raises EnvelopeError as `observe`."""
        signed = codec.open_signed(envelope, CheckpointNotice, network=self._network)
        self.observe(signed.message.checkpoint)

    def status(self) -> dict[str, Any]:
        """What the owner wants to know of the log."""
        record = self._record
        if record is None:
            return {"log_size": 0, "forks": 0, "unproven": 0, "readable": False}
        kinds = [found.kind for found in record.evidence]
        return {
            "log_size": record.size,
            "forks": kinds.count("fork"),
            "unproven": kinds.count("unproven"),
            "readable": True,
        }

    def _admit(self, peer: str, *, by_log: bool) -> None:
        now, all_of_them = time.monotonic(), self._log_itself if by_log else self._all
        if not self._each.take(peer, now) or not all_of_them.take("", now):
            raise RefusedError("not_accepting", "Too many checkpoints in a short time.")

    def _answer(self, asked: WitnessAsk, *, by_log: bool) -> WitnessReply:
        if asked.op == "latest":
            return WitnessReply(state="latest", note=self._held().newest)
        return self._consider(witnessing.decode_submission(asked.body), by_log=by_log)

    def _consider(self, found: Submission, *, by_log: bool) -> WitnessReply:
        record, state = witnessing.submit(
            self._held(),
            found,
            keys=self._keys(),
            witness=self._key,
            name=self._name,
            now=int(self._clock()),
            by_log=by_log,
        )
        self._save(record)
        return WitnessReply(state=state, note=record.newest)

    # --- what we ask ---

    async def keep(self, link: Link) -> None:
        """Fetch the head now and then, for ever."""
        await trio.sleep(_FIRST_FETCH_S)
        while True:
            try:
                await self.fetch(link)
            except LumarisError as error:
                log.info("log not witnessed code=%s", error.code)
            await trio.sleep(_FETCH_S)

    async def fetch(self, link: Link) -> None:
        """Ask the coordinator for its head, cosign it when it extends ours, and hand that in.

        A head below ours is answered with ours: whoever lost a part of the log learns of it.
        Raises LumarisError.
        """
        note = await link.call(coordinator_api.log_checkpoint())
        point, record = merkle.open_checkpoint(note, *self._keys()), self._held()
        if point.size == 0 and record.size == 0:
            return
        path: tuple[bytes, ...] = ()
        if 0 < record.size < point.size:
            path = await link.call(coordinator_api.log_consistency(record.size, point.size))
        if point.size >= record.size:
            self._consider(Submission(record.size, path, note), by_log=True)
        else:
            self.observe(note)
        if self._held().newest:
            await link.call(coordinator_api.add_cosignature(self._held().newest))

    # --- what is remembered ---

    def _keys(self) -> list[bytes]:
        return [keys.public_key_of(peer) for peer in sorted(self._coordinators())]

    def _held(self) -> Record:
        """Raises LumarisError when what was seen cannot be read: it must not be forgotten."""
        if self._record is None:
            raise RefusedError("not_accepting", "What this witness saw before cannot be read.")
        return self._record

    def _load(self) -> Record | None:
        origin = notes.log_origin(self._network)
        try:
            with self._path.open("rb") as file:
                data = file.read(_FILE_BYTES_MAX)
            found = msgspec.json.decode(data, type=Record)
        except FileNotFoundError:
            return Record(origin=origin)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.error("witness file not readable path=%s error=%r", self._path, error)
            return None
        return found if found.origin == origin else None

    def _save(self, record: Record) -> None:
        """Written here and now, some milliseconds a minute: nothing may come between."""
        if record == self._record:
            return
        before = len(self._record.evidence) if self._record is not None else 0
        try:
            write_private_file(self._path, msgspec.json.encode(record))
        except OSError as error:
            raise LumarisError("not_writable", f"{self._path}: {error.strerror}") from None
        self._record = record
        for found in record.evidence[before:]:
            log.critical(
                "the receipts log has two histories kind=%s file=%s", found.kind, self._path
            )
