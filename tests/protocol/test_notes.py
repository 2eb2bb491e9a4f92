"""Signed notes and cosignatures, against the texts of C2SP and a second implementation."""

from __future__ import annotations

import pytest

from lumaris_protocol import merkle, notes
from lumaris_protocol.errors import EnvelopeError
from tests import independent_log as other
from tests.protocol import parties as p

# From C2SP signed-note: a verifier key and a note that it verifies.
VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
NOTE = (
    "This is an example message.\n\n"
    "\u2014 example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3m"
    "FXmRKuwHjG1Yu72IneyaQM=\n"
)
# From C2SP tlog-cosignature: a checkpoint with a cosignature.
CHECKPOINT = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "\u2014 example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5"
    "/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "\u2014 witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrD"
    "JsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
POINT = merkle.Checkpoint(notes.log_origin(p.NETWORK), 42, bytes(range(32)))
SIGNED = merkle.sign_checkpoint(POINT, p.COORDINATOR)
WITNESS = notes.witness_key(p.NETWORK, p.SELLER.peer_id)


def cosigned(now: int = p.NOW) -> str:
    return SIGNED + notes.cosign(POINT.body, p.SELLER, name=WITNESS.name, now=now)


def test_the_example_of_the_specification_verifies() -> None:
    key = notes.parse_vkey(VKEY)
    assert (key.name, key.kind, key.vkey) == ("example.com/foo", notes.ED25519, VKEY)
    assert notes.verify(notes.parse(NOTE), key) == 0
    assert other.signed_by(NOTE, *other.open_vkey(VKEY)) == [0]
    changed = NOTE.replace("example message", "example massage")
    with pytest.raises(EnvelopeError, match="bad_signature"):
        notes.verify(notes.parse(changed), key)


def test_the_example_checkpoint_is_read() -> None:
    note = notes.parse(CHECKPOINT)
    point = merkle.parse_checkpoint(note.text)
    assert (point.origin, point.size) == ("example.com/behind-the-sofa", 20_852_163)
    assert [line.name for line in note.lines] == [point.origin, "witness.example.com/w1"]
    assert "".join(map(notes.line_of, note.lines)) == CHECKPOINT.partition("\n\n")[2]
    # 0x64185c0b... the time of the example, 1679315147.
    assert int.from_bytes(note.lines[1].data[:8], "big") == 1_679_315_147


@pytest.mark.parametrize("now", [0, 1, p.NOW, (1 << 63) - 1])
def test_a_cosignature_says_when(now: int) -> None:
    note = cosigned(now)
    assert notes.verify(notes.parse(note), WITNESS) == now
    assert other.signed_by(note, WITNESS.name, 4, p.SELLER.public_key) == [now]
    assert other.cosigners(note, p.NETWORK) == {p.SELLER.peer_id: now}
    assert merkle.open_checkpoint(note, p.COORDINATOR.public_key) == POINT


def test_keys_that_are_not_on_a_note() -> None:
    note = notes.parse(cosigned())
    for key in (
        notes.witness_key(p.NETWORK, p.BUYER.peer_id),
        notes.witness_key("othernet", p.SELLER.peer_id),
        notes.NoteKey(WITNESS.name, notes.ED25519, p.SELLER.public_key),
        notes.NoteKey(POINT.origin, notes.COSIGNATURE, p.COORDINATOR.public_key),
    ):
        assert notes.verify(note, key) is None


def test_a_cosignature_is_of_one_time_and_text() -> None:
    text, _, lines = cosigned().rpartition("\n\n")
    ours, theirs = lines.splitlines(keepends=True)
    later = notes.cosign(POINT.body, p.SELLER, name=WITNESS.name, now=p.NOW + 1)
    line = notes.parse(SIGNED + later).lines[1]
    old = notes.parse(SIGNED + theirs).lines[1]
    mixed = notes.line_of(notes.Line(line.name, line.key_id, line.data[:8] + old.data[8:]))
    other_text = text.replace("42", "43")
    for bad in (f"{text}\n\n{ours}{mixed}", f"{other_text}\n\n{ours}{theirs}"):
        with pytest.raises(EnvelopeError, match="bad_signature"):
            notes.verify(notes.parse(bad), WITNESS)
        with pytest.raises(other.Wrong):
            other.signed_by(bad, WITNESS.name, 4, p.SELLER.public_key)


def test_the_newest_of_several_times_counts_and_all_must_hold() -> None:
    again = notes.cosign(POINT.body, p.SELLER, name=WITNESS.name, now=p.NOW - 5)
    assert notes.verify(notes.parse(cosigned() + again), WITNESS) == p.NOW
    bad = notes.line_of(notes.Line(WITNESS.name, WITNESS.id, bytes(72)))
    with pytest.raises(EnvelopeError, match="bad_signature"):
        notes.verify(notes.parse(cosigned() + bad), WITNESS)


def test_names_of_witnesses() -> None:
    assert notes.witness_of(p.NETWORK, WITNESS.name) == WITNESS
    for name in ("x", "lumaris.other/witness/" + p.SELLER.peer_id, WITNESS.name[:-1]):
        assert notes.witness_of(p.NETWORK, name) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a+b",
        VKEY[:-1],
        VKEY.replace("530d", "530e"),
        VKEY.replace("example.com", "example com"),
        VKEY.replace("+Ae", "+Be"),
        VKEY.replace("example.com/foo", ""),
        "a+b+\ud800",
        "\ud800+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
    ],
)
def test_what_is_no_verifier_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|base64|surrogates"):
        notes.parse_vkey(text)


@pytest.mark.parametrize(
    "note",
    [
        "x\n\n",
        "\n\n\u2014 a QUJDREU=\n",
        "x\n\n\u2014 a QUJDREU=",
        "x\n\n\u2014 a QUJDREU=\n\n",
        "x\n\n\u2014 a QUJDREU\n",
        "x\n\n\u2014 a QUJDRA==\n",
        "x\n\n\u2014 a QUJDREV=\n",
        "x\n\n\u2014 a+b QUJDREU=\n",
        "x\n\n\u2014  QUJDREU=\n",
        "x\n\n- a QUJDREU=\n",
        "x\t\n\n\u2014 a QUJDREU=\n",
        "x\r\n\n\u2014 a QUJDREU=\n",
        "x\ud800\n\n\u2014 a QUJDREU=\n",
    ],
)
def test_what_is_no_note(note: str) -> None:
    with pytest.raises(EnvelopeError, match="malformed"):
        notes.parse(note)


def test_a_text_may_hold_empty_lines() -> None:
    note = notes.parse("a\n\nb\n\n\u2014 a QUJDREU=\n")
    assert (note.text, note.lines) == ("a\n\nb\n", (notes.Line("a", b"ABCD", b"E"),))


def test_our_own_names_are_checked() -> None:
    with pytest.raises(ValueError, match="name"):
        notes.sign("x\n", p.COORDINATOR, name="a b")
