"""What a witness of the receipts log knows, and when it signs (C2SP tlog-witness).

A witness keeps the newest checkpoint that it cosigned. It signs a larger one only with the proof
that nothing before it changed, and never a smaller one. Two checkpoints of one log that cannot both
be true are kept as evidence. Sans-I/O: records in, records out; whoever holds a record saves it
before the signature in it is given away.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from lumaris_protocol import limits, merkle, notes
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.merkle import Checkpoint

# Checkpoints remembered to compare with what others show: a day of them at one every quarter hour.
SEEN_MAX: Final = 96
# One fork is enough to prove a lie; some more show whether it goes on.
EVIDENCE_MAX: Final = 8

State = Literal["cosigned", "elsewhere", "inconsistent", "latest"]
NoteText = Annotated[str, Meta(max_length=limits.CHECKPOINT_CHARS_MAX)]


class WitnessAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The one frame from the log to a witness: sign `body` (C2SP add-checkpoint), or just tell."""

    op: Literal["cosign", "latest"]
    body: Annotated[str, Meta(max_length=limits.WITNESS_CHARS_MAX)] = ""


class WitnessReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The witness's answer. `note` is the newest checkpoint that it cosigned; "" if there is none.

    `elsewhere`: the old size is not that of `note`. `inconsistent`: it does not follow from `note`.
    """

    state: State
    note: NoteText = ""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Two checkpoints signed by one log: of one size with two roots (`fork`), or of two sizes
    where the log failed to prove that one extends the other (`unproven`)."""

    kind: Literal["fork", "unproven"]
    first: NoteText
    second: NoteText


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that the log's key signed, whoever showed it."""

    size: int
    root: bytes
    note: NoteText


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All that a witness remembers of one log. `newest` carries the witness's own cosignature."""

    origin: str
    newest: NoteText = ""
    size: int = 0
    seen: Annotated[tuple[Seen, ...], Meta(max_length=SEEN_MAX)] = ()
    evidence: Annotated[tuple[Evidence, ...], Meta(max_length=EVIDENCE_MAX)] = ()


@dataclass(frozen=True)
class Submission:
    """A checkpoint with the proof that it extends the log of `old` leaves."""

    old: int
    path: tuple[bytes, ...]
    note: str


def encode_submission(found: Submission) -> str:
    """The body of an add-checkpoint request."""
    proof = "".join(f"{base64.b64encode(node).decode()}\n" for node in found.path)
    return f"old {found.old}\n{proof}\n{found.note}"


def decode_submission(body: str) -> Submission:
    """An add-checkpoint request's content. Raises EnvelopeError: `malformed` or `oversize`."""
    head, separator, note = body.partition("\n\n")
    first, *lines = head.split("\n")
    shown = first.removeprefix("old ")
    size = int(shown) if shown.isascii() and shown.isdigit() and len(shown) < 19 else -1
    if size < 0 or not separator or f"old {size}" != first:
        raise EnvelopeError("malformed", "The request names no old size.")
    if len(lines) > limits.CONSISTENCY_HASHES_MAX:
        raise EnvelopeError("oversize", "The request has too many hashes.")
    try:
        path = tuple(base64.b64decode(line, validate=True) for line in lines)
    except ValueError:
        path = (b"",)
    if any(len(node) != 32 for node in path):
        raise EnvelopeError("malformed", "A line of the request is no hash.")
    return Submission(size, path, note)


def submit(
    record: Record,
    found: Submission,
    *,
    keys: Iterable[bytes],
    witness: KeyPair,
    name: str,
    now: int,
    by_log: bool,
) -> tuple[Record, State]:
    """What a witness makes of a submission: the record to save, and what to answer with it.

    `by_log` says that the log itself brought it: only then a proof that fails is held against it.
    Raises EnvelopeError for a note that no key of the log signed, or of another log.
    """
    point = _open(record, found.note, keys)
    if found.old > point.size:
        raise EnvelopeError("malformed", "The old size is above the checkpoint's.")
    record = observe(record, found.note, keys=keys)
    if _contradicts(record, point):
        return record, "inconsistent"
    if found.old != record.size or point.size < record.size:
        return record, "elsewhere"
    shown = _log_part(found.note, point, keys)
    if not _extends(record, point, found.path):
        if by_log:
            record = _with_evidence(record, "unproven", shown, point.size)
        return record, "inconsistent"
    note = f"{shown}{notes.cosign(point.body, witness, name=name, now=now)}"
    return msgspec.structs.replace(record, newest=note, size=point.size), "cosigned"


def observe(record: Record, note: str, *, keys: Iterable[bytes]) -> Record:
    """Remember a checkpoint that somebody showed; a fork becomes evidence.

    Raises EnvelopeError for a note that no key of the log signed, or of another log.
    """
    point = _open(record, note, keys)
    shown = _log_part(note, point, keys)
    held = next((seen for seen in record.seen if seen.size == point.size), None)
    if held is not None:
        same = held.root == point.root
        return record if same else _with_evidence(record, "fork", shown, point.size)
    kept = Seen(size=point.size, root=point.root, note=shown)
    # The oldest sizes go first: a fork is looked for near the end of the log.
    seen = sorted((*record.seen, kept), key=lambda one: one.size)[-SEEN_MAX:]
    return msgspec.structs.replace(record, seen=tuple(seen))


def _open(record: Record, note: str, keys: Iterable[bytes]) -> Checkpoint:
    point = merkle.open_checkpoint(note, *keys)
    if point.origin != record.origin:
        raise EnvelopeError("wrong_domain", "The checkpoint is of another log.")
    if point.size == 0 and point.root != merkle.EMPTY_ROOT:
        raise EnvelopeError("malformed", "The empty log has another root.")
    return point


def _contradicts(record: Record, point: Checkpoint) -> bool:
    return any(one.size == point.size and one.root != point.root for one in record.seen)


def _extends(record: Record, point: Checkpoint, path: Sequence[bytes]) -> bool:
    if record.size == 0:
        return not path
    newest = merkle.parse_checkpoint(notes.parse(record.newest).text)
    return merkle.verify_consistency(
        old=newest.size, old_root=newest.root, size=point.size, root=point.root, path=path
    )


def _with_evidence(
    record: Record, kind: Literal["fork", "unproven"], note: str, size: int
) -> Record:
    """Keep two checkpoints that cannot both be true; the first pairs are the ones kept."""
    same = next((one.note for one in record.seen if one.size == size), "")
    found = Evidence(kind=kind, first=same if kind == "fork" else record.newest, second=note)
    if found in record.evidence or len(record.evidence) >= EVIDENCE_MAX:
        return record
    return msgspec.structs.replace(record, evidence=(*record.evidence, found))


def _log_part(note: str, point: Checkpoint, keys: Iterable[bytes]) -> str:
    """The note with the log's own signatures only, each of them checked: what others added is not
    ours to pass on, and a false line would spoil the note for whoever meets it first."""
    names = [notes.NoteKey(point.origin, notes.ED25519, key) for key in keys]
    known = {(key.name, key.id): key for key in names}
    lines: dict[str, None] = {}
    for line in notes.parse(note).lines:
        key = known.get((line.name, line.key_id))
        if key is not None and _holds(line, point, key):
            lines[notes.line_of(line)] = None
    return f"{point.body}\n{''.join(lines)}"


def _holds(line: notes.Line, point: Checkpoint, key: notes.NoteKey) -> bool:
    try:
        return notes.verify(notes.Note(point.body, (line,)), key) is not None
    except EnvelopeError:
        return False
