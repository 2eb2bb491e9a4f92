"""Policies: what they allow to write, and whom they take for enough."""

from __future__ import annotations

import pytest

from lumaris_protocol import log_policy, merkle, notes
from lumaris_protocol.errors import EnvelopeError, RefusedError
from lumaris_protocol.keys import KeyPair
from tests.protocol import parties as p

W = [KeyPair(bytes([number]) * 32) for number in range(50, 56)]
LOG = notes.log_key(p.NETWORK, p.COORDINATOR.public_key)
KEYS = [notes.witness_key(p.NETWORK, key.peer_id) for key in W]
POINT = merkle.Checkpoint(LOG.name, 42, bytes(range(32)))
LINES = "".join(f"witness W{n} {key.vkey}\n" for n, key in enumerate(KEYS))


def note(*witnesses: int) -> str:
    lines = [notes.cosign(POINT.body, W[n], name=KEYS[n].name, now=p.NOW) for n in witnesses]
    return merkle.sign_checkpoint(POINT, p.COORDINATOR) + "".join(lines)


def policy(rules: str, *, log: bool = True) -> log_policy.LogPolicy:
    head = f"log {LOG.vkey}\n" if log else ""
    return log_policy.parse(f"{head}{LINES}{rules}".encode())


NESTED = """
group X 2 W0 W1 W2   \t
  # operated by another organisation
group Y any W3 W4
group both all X Y
quorum both
"""


@pytest.mark.parametrize(
    ("rules", "cosigned", "enough"),
    [
        ("quorum none", (), True),
        ("quorum W0", (), False),
        ("quorum W0", (0,), True),
        ("quorum W0", (1, 2, 3), False),
        ("group g any W0 W1\nquorum g", (1,), True),
        ("group g all W0 W1\nquorum g", (1,), False),
        ("group g all W0 W1\nquorum g", (0, 1), True),
        (NESTED, (0, 1, 3), True),
        (NESTED, (0, 1, 2), False),
        (NESTED, (0, 3, 4), False),
        (NESTED, (1, 2, 4), True),
        (NESTED, (), False),
        ("group g 2 W0 W1\nquorum none", (), True),
    ],
)
def test_quorums(rules: str, cosigned: tuple[int, ...], enough: bool) -> None:
    found = log_policy.check(policy(rules), note(*cosigned))
    assert (found.checkpoint, found.log, found.enough) == (POINT, LOG, enough)
    assert found.witnesses == tuple(f"W{n}" for n in cosigned)


def test_a_witness_counts_once_however_often_it_signs() -> None:
    twice = note(0) + note(0).rpartition("\n\n")[2].splitlines(keepends=True)[1]
    assert not log_policy.check(policy("group g 2 W0 W1\nquorum g"), twice).enough


def test_a_log_must_be_listed_under_its_origin() -> None:
    wrong = notes.NoteKey("lumaris.other/log", notes.ED25519, p.COORDINATOR.public_key)
    found = log_policy.parse(f"log {wrong.vkey}\nquorum none\n".encode())
    assert log_policy.check(found, note()).log is None
    assert log_policy.check(policy("quorum none", log=False), note()).log is None


def test_a_known_key_with_a_bad_line_spoils_the_note() -> None:
    bad = notes.line_of(notes.Line(KEYS[3].name, KEYS[3].id, bytes(72)))
    with pytest.raises(EnvelopeError, match="bad_signature"):
        log_policy.check(policy("quorum none"), note(0) + bad)
    stranger = notes.line_of(notes.Line("x", bytes(4), bytes(72)))
    assert log_policy.check(policy("quorum W0"), note(0) + stranger).enough


@pytest.mark.parametrize(
    "rules",
    [
        "",
        "quorum none\nquorum none",
        "quorum",
        "quorum W0 W1",
        "quorum W9",
        "quorum g\ngroup g any W0",
        "group g any\nquorum none",
        "group g 0 W0\nquorum none",
        "group g 3 W0 W1\nquorum none",
        "group g most W0 W1\nquorum none",
        "group g ١ W0 W1\nquorum none",  # noqa: RUF001
        "group g any none\nquorum none",
        "group none any W0\nquorum none",
        "group W0 any W1\nquorum none",
        "group g any W0 W0\nquorum none",
        "group g any W0\ngroup h any W0\nquorum none",
        "group g any g\nquorum none",
        f"log {LOG.vkey}\nquorum none",
        "log\nquorum none",
        f"log {KEYS[0].vkey}\nquorum none",
        f"witness W0 {KEYS[0].vkey}\nquorum none",
        f"witness W9 {KEYS[0].vkey}\nquorum none",
        f"witness W9 {LOG.vkey}\nquorum none",
        "witness W9\nquorum none",
        "witness W9 x\nquorum none",
        "mirror x\nquorum none",
        "Quorum none",
        "quorum\u00a0none",
    ],
)
def test_what_is_no_policy(rules: str) -> None:
    with pytest.raises(RefusedError, match="malformed"):
        policy(rules)


@pytest.mark.parametrize("data", [b"quorum none\r\n", b"\x00", b"quorum none\x7f\n"])
def test_control_characters(data: bytes) -> None:
    with pytest.raises(RefusedError, match="control"):
        log_policy.parse(data)


def test_bounds() -> None:
    with pytest.raises(RefusedError, match="oversize"):
        log_policy.parse(b"#" * (log_policy.POLICY_BYTES_MAX + 1))
    many = "".join(
        f"witness w{n} {notes.witness_key('n', KeyPair(n.to_bytes(32, 'big')).peer_id).vkey}\n"
        for n in range(1, log_policy.ITEMS_MAX + 2)
    )
    with pytest.raises(RefusedError, match="too many"):
        log_policy.parse(f"{many}quorum none\n".encode())


def test_names_are_opaque_bytes_and_urls_are_read_over() -> None:
    data = b"witness \xff\xfe " + KEYS[0].vkey.encode() + b" https://w.example/\nquorum \xff\xfe"
    found = log_policy.check(log_policy.parse(data), note(0))
    assert found.enough
    assert log_policy.parse(f"log {LOG.vkey} https://x.example/\nquorum none".encode()).logs == [
        LOG
    ]
