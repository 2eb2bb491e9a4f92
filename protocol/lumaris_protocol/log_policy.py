"""Whose word makes a checkpoint good enough: a C2SP tlog-policy file.

    log <vkey> [<url>]
    witness <name> <vkey> [<url>]
    group <name> all|any|<k> <name>...
    quorum <name>|none

A checkpoint counts when one of the logs signed it and enough witnesses cosigned it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lumaris_protocol import merkle, notes
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import KIB
from lumaris_protocol.merkle import Checkpoint
from lumaris_protocol.notes import NoteKey

POLICY_BYTES_MAX: Final = 256 * KIB
# Of each kind; C2SP asks for at least 32.
ITEMS_MAX: Final = 256
NONE: Final = "none"


@dataclass(frozen=True)
class Group:
    """Counts as a witness when at least `threshold` of its members do."""

    threshold: int
    members: tuple[str, ...]


@dataclass
class LogPolicy:
    """A policy file's content. Names mean something inside of it only."""

    logs: list[NoteKey] = field(default_factory=list)
    witnesses: dict[str, NoteKey] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    quorum: str = NONE


@dataclass(frozen=True)
class Standing:
    """What a policy makes of a checkpoint."""

    checkpoint: Checkpoint
    log: NoteKey | None  # the known log key that signed it
    witnesses: tuple[str, ...]  # the known witnesses that cosigned it
    enough: bool  # whether they are a quorum


def parse(data: bytes) -> LogPolicy:
    """The policy in a file. Raises RefusedError `oversize` or `malformed`, naming the line."""
    if len(data) > POLICY_BYTES_MAX:
        raise RefusedError("oversize", "The policy file is too large.")
    if any((byte < 32 and byte not in b"\t\n") or byte == 127 for byte in data):
        raise RefusedError("malformed", "The policy file holds control characters.")
    # Names are opaque bytes; those that are no UTF-8 keep their identity as well.
    text = data.decode("utf-8", "surrogateescape")
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), 1):
        words = [word for word in line.replace("\t", " ").split(" ") if word]
        if words and not words[0].startswith("#"):
            try:
                reader.take(words)
            except ValueError as error:
                raise RefusedError("malformed", f"Line {number} of the policy: {error}.") from None
    if not reader.decided:
        raise RefusedError("malformed", "The policy has no quorum line.")
    return reader.policy


def check(policy: LogPolicy, note: str) -> Standing:
    """What the policy makes of a note.

    Raises EnvelopeError: `malformed`, `oversize`, or `bad_signature` for a line that names a known
    key and does not verify.
    """
    parsed = notes.parse(note)
    checkpoint = merkle.parse_checkpoint(parsed.text)
    signed = [key for key in policy.logs if notes.verify(parsed, key) is not None]
    ours = [key for key in signed if key.name == checkpoint.origin]
    cosigned = [
        name for name, key in policy.witnesses.items() if notes.verify(parsed, key) is not None
    ]
    return Standing(
        checkpoint=checkpoint,
        log=ours[0] if ours else None,
        witnesses=tuple(cosigned),
        enough=_is_met(policy, frozenset(cosigned)),
    )


def _is_met(policy: LogPolicy, cosigned: frozenset[str]) -> bool:
    """Whether these witnesses are a quorum. Groups name only what stands before them."""
    met = set(cosigned)
    for name, group in policy.groups.items():
        if sum(member in met for member in group.members) >= group.threshold:
            met.add(name)
    return policy.quorum == NONE or policy.quorum in met


class _Reader:
    """Takes a policy's lines in order. Each raises ValueError for what it does not allow."""

    def __init__(self) -> None:
        self.policy = LogPolicy()
        self.decided = False
        self._members: set[str] = set()
        self._rules: dict[str, Callable[[list[str]], None]] = {
            "log": self._log,
            "witness": self._witness,
            "group": self._group,
            "quorum": self._quorum,
        }

    def take(self, words: list[str]) -> None:
        rule = self._rules.get(words[0])
        if rule is None:
            raise ValueError("it is no log, witness, group or quorum")
        rule(words[1:])

    def _log(self, words: list[str]) -> None:
        if len(words) not in (1, 2):
            raise ValueError("a log is a key and at most a URL")
        key = notes.parse_vkey(words[0])
        if key.kind != notes.ED25519:
            raise ValueError("a log's key is an Ed25519 key (01)")
        self._check_new(key, self.policy.logs)
        self.policy.logs.append(key)

    def _witness(self, words: list[str]) -> None:
        if len(words) not in (2, 3):
            raise ValueError("a witness is a name, a key and at most a URL")
        self._check_name(words[0])
        key = notes.parse_vkey(words[1])
        if key.kind != notes.COSIGNATURE:
            raise ValueError("a witness's key is a cosignature key (04)")
        self._check_new(key, list(self.policy.witnesses.values()))
        self.policy.witnesses[words[0]] = key

    def _group(self, words: list[str]) -> None:
        if len(words) < 3 or len(words) > ITEMS_MAX:
            raise ValueError("a group is a name, a threshold and members")
        name, shown, members = words[0], words[1], words[2:]
        self._check_name(name)
        for member in members:
            self._check_known(member)
            if member in self._members:
                raise ValueError("a member stands in one group, once")
            self._members.add(member)
        named = {"any": 1, "all": len(members)}
        digits = shown.isascii() and shown.isdigit() and len(shown) < 4
        threshold = named.get(shown, int(shown) if digits else 0)
        if not 1 <= threshold <= len(members):
            raise ValueError("a threshold is any, all, or a number of members")
        if len(self.policy.groups) >= ITEMS_MAX:
            raise ValueError("there are too many groups")
        self.policy.groups[name] = Group(threshold, tuple(members))

    def _quorum(self, words: list[str]) -> None:
        if self.decided or len(words) != 1:
            raise ValueError("there is one quorum line, with one name")
        if words[0] != NONE:
            self._check_known(words[0])
        self.policy.quorum, self.decided = words[0], True

    def _check_known(self, name: str) -> None:
        if name not in self.policy.witnesses and name not in self.policy.groups:
            raise ValueError("a name is used that no line above it defines")

    def _check_name(self, name: str) -> None:
        if name == NONE or name in self.policy.witnesses or name in self.policy.groups:
            raise ValueError("the name is taken")

    @staticmethod
    def _check_new(key: NoteKey, others: list[NoteKey]) -> None:
        if len(others) >= ITEMS_MAX:
            raise ValueError("there are too many keys")
        if any(other.public_key == key.public_key for other in others):
            raise ValueError("the key stands here twice")
