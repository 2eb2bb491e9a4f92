"""What a witness signs, and what it keeps as evidence."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_protocol import merkle, notes, witnessing
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import WITNESS_CHARS_MAX
from lumaris_protocol.witnessing import Record, State, Submission
from tests import independent_log as other
from tests.protocol import parties as p

ORIGIN = notes.log_origin(p.NETWORK)
NAME = notes.witness_key(p.NETWORK, p.SELLER.peer_id).name
KEYS = (p.COORDINATOR.public_key,)
TRUE = merkle.Tree(merkle.leaf_hash(str(n).encode()) for n in range(64))
FALSE = merkle.Tree(merkle.leaf_hash(b"another" if n == 5 else str(n).encode()) for n in range(64))
EMPTY = Record(origin=ORIGIN)


def head(size: int, tree: merkle.Tree = TRUE, *, origin: str = ORIGIN) -> str:
    return merkle.sign_checkpoint(merkle.Checkpoint(origin, size, tree.root(size)), p.COORDINATOR)


def proof(old: int, size: int, tree: merkle.Tree = TRUE) -> tuple[bytes, ...]:
    return tuple(tree.consistency_proof(old, size)) if 0 < old < size else ()


def submit(record: Record, old: int, size: int, tree: merkle.Tree = TRUE) -> tuple[Record, State]:
    found = Submission(old, proof(old, size, tree), head(size, tree))
    return give(record, found)


def give(record: Record, found: Submission, *, by_log: bool = True) -> tuple[Record, State]:
    return witnessing.submit(
        record, found, keys=KEYS, witness=p.SELLER, name=NAME, now=p.NOW, by_log=by_log
    )


def test_a_witness_follows_a_log_that_grows() -> None:
    record = EMPTY
    for old, size in ((0, 3), (3, 8), (8, 8), (8, 64)):
        record, state = submit(record, old, size)
        assert (state, record.size, record.evidence) == ("cosigned", size, ())
        assert merkle.open_checkpoint(record.newest, *KEYS).size == size
        assert other.cosigners(record.newest, p.NETWORK) == {p.SELLER.peer_id: p.NOW}


def test_another_old_size_is_answered_with_what_was_seen() -> None:
    record, _ = submit(EMPTY, 0, 10)
    for old, size in ((0, 12), (9, 12), (11, 12), (0, 0), (5, 9)):
        after, state = submit(record, old, size)
        assert (state, after.newest, after.size) == ("elsewhere", record.newest, 10)
        assert after.evidence == ()


def test_nothing_smaller_is_signed() -> None:
    record, _ = submit(EMPTY, 0, 10)
    for old in range(10):
        after, state = submit(record, old, 9)
        assert (state, after.newest) == ("elsewhere", record.newest)


def test_two_histories_of_one_size_are_evidence() -> None:
    record, _ = submit(EMPTY, 0, 10)
    after, state = submit(record, 10, 10, FALSE)
    assert (state, after.newest) == ("inconsistent", record.newest)
    (found,) = after.evidence
    assert found.kind == "fork"
    points = [merkle.open_checkpoint(note, *KEYS) for note in (found.first, found.second)]
    assert points[0].size == points[1].size
    assert points[0].root != points[1].root
    again, _ = submit(after, 10, 10, FALSE)
    assert again == after


def test_a_log_that_cannot_prove_its_growth_is_not_signed() -> None:
    record, _ = submit(EMPTY, 0, 10)
    after, state = submit(record, 10, 20, FALSE)
    assert (state, after.newest) == ("inconsistent", record.newest)
    assert [found.kind for found in after.evidence] == ["unproven"]
    for path in ((), proof(10, 20)[:-1], (*proof(10, 20), bytes(32))):
        _, state = give(record, Submission(10, path, head(20)))
        assert state == "inconsistent"
    assert submit(record, 10, 20)[1] == "cosigned"


def test_a_stranger_with_a_bad_proof_accuses_nobody() -> None:
    record, _ = submit(EMPTY, 0, 10)
    found = Submission(10, (bytes(32),), head(20))
    after, state = give(record, found, by_log=False)
    assert (state, after.evidence, after.newest) == ("inconsistent", (), record.newest)


def test_a_first_checkpoint_needs_no_proof_and_takes_none() -> None:
    assert give(EMPTY, Submission(0, (bytes(32),), head(5)))[1] == "inconsistent"
    assert give(EMPTY, Submission(0, (), head(0)))[1] == "cosigned"


def test_what_others_show_is_compared() -> None:
    record, _ = submit(EMPTY, 0, 20)
    record = witnessing.observe(record, head(7), keys=KEYS)
    assert (record.size, record.evidence) == (20, ())
    # Below what we cosigned, and still a lie.
    forked = witnessing.observe(record, head(7, FALSE), keys=KEYS)
    assert [found.kind for found in forked.evidence] == ["fork"]
    assert witnessing.observe(record, head(30), keys=KEYS).evidence == ()


def test_evidence_is_kept_when_the_fork_came_first() -> None:
    """A lie told to us, and the truth told to others: whichever comes second shows it."""
    record, _ = submit(EMPTY, 0, 20, FALSE)
    assert [one.kind for one in witnessing.observe(record, head(20), keys=KEYS).evidence] == [
        "fork"
    ]


@pytest.mark.parametrize(
    ("note", "code"),
    [
        (merkle.sign_checkpoint(merkle.Checkpoint(ORIGIN, 3, bytes(32)), p.STRANGER), "bad_sig"),
        (head(3, origin="lumaris.other/log"), "wrong_domain"),
        (
            merkle.sign_checkpoint(merkle.Checkpoint(ORIGIN, 0, bytes(32)), p.COORDINATOR),
            "malformed",
        ),
        ("x", "malformed"),
    ],
)
def test_what_the_log_did_not_sign_is_refused(note: str, code: str) -> None:
    with pytest.raises(EnvelopeError, match=code):
        witnessing.observe(EMPTY, note, keys=KEYS)
    with pytest.raises(EnvelopeError, match=code):
        give(EMPTY, Submission(0, (), note))


def test_an_old_size_above_the_new_one_is_refused() -> None:
    with pytest.raises(EnvelopeError, match="malformed"):
        submit(EMPTY, 9, 3)


def test_after_a_rotation_both_keys_count() -> None:
    record, _ = submit(EMPTY, 0, 10)
    point = merkle.Checkpoint(ORIGIN, 20, TRUE.root(20))
    found = Submission(10, proof(10, 20), merkle.sign_checkpoint(point, p.STRANGER))
    with pytest.raises(EnvelopeError, match="bad_signature"):
        give(record, found)
    keys = (*KEYS, p.STRANGER.public_key)
    record, state = witnessing.submit(
        record, found, keys=keys, witness=p.SELLER, name=NAME, now=p.NOW, by_log=True
    )
    assert (state, record.size) == ("cosigned", 20)


def test_a_record_is_bounded_and_goes_round() -> None:
    record, _ = submit(EMPTY, 0, 1)
    lines = "".join(head(2).rpartition("\n\n")[2] for _ in range(20))
    big = merkle.Tree(merkle.leaf_hash(str(n).encode()) for n in range(200))
    for size in range(2, 200):
        note = f"{head(size, big)}{lines if size == 2 else ''}"
        record = witnessing.observe(record, note, keys=KEYS)
    for number in range(50, 70):
        fork = merkle.Tree(merkle.leaf_hash(b"x%d" % number) for _ in range(199))
        record = witnessing.observe(record, head(199, fork), keys=KEYS)
    assert len(record.seen) == witnessing.SEEN_MAX
    assert len(record.evidence) == witnessing.EVIDENCE_MAX
    data = msgspec.json.encode(record)
    assert len(data) < 100_000
    assert msgspec.json.decode(data, type=Record) == record


def test_a_request_goes_round() -> None:
    found = Submission(20, proof(20, 64), head(64))
    body = witnessing.encode_submission(found)
    assert body.startswith("old 20\n")
    assert witnessing.decode_submission(body) == found
    first = Submission(0, (), head(3))
    assert witnessing.decode_submission(witnessing.encode_submission(first)) == first
    assert witnessing.encode_submission(first) == f"old 0\n\n{head(3)}"


def test_the_largest_request_fits() -> None:
    lines = head(64) + "".join(
        notes.cosign("x\n", p.SELLER, name=NAME, now=p.NOW) for _ in range(24)
    )
    assert len(witnessing.encode_submission(Submission(1, (bytes(32),) * 63, lines))) < (
        WITNESS_CHARS_MAX
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", "malformed"),
        ("old 3", "malformed"),
        ("old 03\n\nx", "malformed"),
        ("old -1\n\nx", "malformed"),
        ("old x\n\nx", "malformed"),
        ("old " + "9" * 20 + "\n\nx", "malformed"),
        ("new 3\n\nx", "malformed"),
        ("old 3\nAAAA\n\nx", "malformed"),
        ("old 3\n?\n\nx", "malformed"),
        ("old 3\n" + "A" * 43 + "=\n" * 64 + "\n\nx", "oversize"),
    ],
)
def test_what_is_no_request(body: str, code: str) -> None:
    with pytest.raises(EnvelopeError, match=code):
        witnessing.decode_submission(body)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=12
    )
)
def test_whatever_it_is_shown_a_witness_signs_one_history(
    shown: list[tuple[bool, int, int]],
) -> None:
    """A log that tells two stories in any order: all that one witness signs is of one of them."""
    record, signed = EMPTY, [0]
    roots: dict[int, bytes] = {}
    for true, old, size in shown:
        if old > size:
            continue
        tree = TRUE if true else FALSE
        record, state = submit(record, old, size, tree)
        if state == "cosigned":
            assert size >= signed[-1]
            signed.append(size)
            roots[size] = tree.root(size)
    stories = [{size: tree.root(size) for size in roots} == roots for tree in (TRUE, FALSE)]
    assert any(stories)
