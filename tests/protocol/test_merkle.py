"""The log's tree against RFC 6962's vectors and another implementation, and its checkpoints."""

from __future__ import annotations

import base64
import hashlib

import pymerkle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import limits, merkle
from lumaris_protocol.errors import EnvelopeError
from tests.protocol import parties as p

# The inputs and roots of certificate-transparency's own tests.
RFC_LEAVES = [
    bytes.fromhex(text)
    for text in (
        *("", "00", "10", "2021", "3031", "40414243", "5051525354555657"),
        "606162636465666768696a6b6c6d6e6f",
    )
]
RFC_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree_of(size: int) -> merkle.Tree:
    return merkle.Tree(merkle.leaf_hash(str(n).encode()) for n in range(size))


def test_the_roots_of_rfc_6962() -> None:
    assert merkle.Tree().root() == merkle.EMPTY_ROOT == hashlib.sha256(b"").digest()
    tree = merkle.Tree()
    for index, leaf in enumerate(RFC_LEAVES):
        assert tree.append(merkle.leaf_hash(leaf)) == index
        assert tree.root().hex() == RFC_ROOTS[index]
    assert [tree.root(size).hex() for size in range(1, 9)] == RFC_ROOTS


def test_the_proofs_of_rfc_6962() -> None:
    """The seven-leaf tree drawn in section 2.1.3."""
    tree = tree_of(7)
    a, b, c, d, e, f, j = (merkle.leaf_hash(str(n).encode()) for n in range(7))
    g, h, i = merkle.node_hash(a, b), merkle.node_hash(c, d), merkle.node_hash(e, f)
    k, el = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert tree.inclusion_proof(0) == [b, h, el]
    assert tree.inclusion_proof(3) == [c, g, el]
    assert tree.inclusion_proof(4) == [f, j, k]
    assert tree.inclusion_proof(6) == [i, k]
    assert tree.consistency_proof(3) == [c, d, g, el]
    assert tree.consistency_proof(4) == [el]
    assert tree.consistency_proof(6) == [i, j, k]
    assert tree.consistency_proof(7) == []


def test_roots_agree_with_pymerkle() -> None:
    other = pymerkle.InmemoryTree(algorithm="sha256")
    tree = merkle.Tree()
    for n in range(70):
        entry = f"entry {n}".encode()
        other.append_entry(entry)
        tree.append(merkle.leaf_hash(entry))
        assert tree.root() == other.get_root(), n


@pytest.mark.slow
@given(st.integers(min_value=1, max_value=130), st.data())
def test_every_inclusion_verifies_and_no_other(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(min_value=0, max_value=size - 1))
    tree = tree_of(size)
    leaf, path, root = (
        merkle.leaf_hash(str(index).encode()),
        tree.inclusion_proof(index),
        tree.root(),
    )

    def holds(**changes: object) -> bool:
        fields = {"leaf": leaf, "index": index, "size": size, "path": path, "root": root}
        return merkle.verify_inclusion(**(fields | changes))  # type: ignore[arg-type]

    assert holds()
    assert not holds(leaf=merkle.leaf_hash(b"other"))
    assert not holds(root=bytes(32))
    assert not holds(path=[*path, bytes(32)])
    assert not holds(index=-1)
    assert not holds(index=size)
    if path:
        spot = data.draw(st.integers(min_value=0, max_value=len(path) - 1))
        assert not holds(path=path[:-1])
        assert not holds(path=[*path[:spot], bytes(32), *path[spot + 1 :]])
        assert not holds(index=data.draw(st.integers(0, size - 1).filter(lambda n: n != index)))


@given(st.integers(min_value=1, max_value=130), st.data())
def test_every_extension_verifies_and_no_other(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(min_value=1, max_value=size))
    tree = tree_of(size)
    path = tree.consistency_proof(old)

    def holds(**changes: object) -> bool:
        fields = {"old": old, "old_root": tree.root(old), "size": size, "root": tree.root()}
        return merkle.verify_consistency(**({"path": path} | fields | changes))  # type: ignore[arg-type]

    assert holds()
    assert not holds(old_root=bytes(32))
    assert not holds(root=bytes(32))
    assert not holds(path=[*path, bytes(32)])
    assert not holds(old=0)
    if path:
        spot = data.draw(st.integers(min_value=0, max_value=len(path) - 1))
        assert not holds(path=path[:-1])
        assert not holds(path=[])
        assert not holds(path=[*path[:spot], bytes(32), *path[spot + 1 :]])
        assert not holds(old=size + 1)


def test_a_leaf_is_not_a_node() -> None:
    """Without the prefixes an inner node could pass for a leaf."""
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)


def test_sizes_that_never_were_are_refused() -> None:
    tree = tree_of(5)
    for size in (-1, 6):
        with pytest.raises(ValueError, match="never had"):
            tree.root(size)
    for index in (-1, 5):
        with pytest.raises(ValueError, match="no such leaf"):
            tree.inclusion_proof(index)
    for old in (0, 6):
        with pytest.raises(ValueError, match="between 1"):
            tree.consistency_proof(old)
    assert tree.root(0) == merkle.EMPTY_ROOT


def test_a_set_of_files_has_one_name_in_any_order() -> None:
    one, two = p.file("a", b"1"), p.file("b", b"2")
    assert merkle.files_root((one, two)) == merkle.files_root((two, one))
    assert merkle.files_root((one,)) != merkle.files_root((two,))
    assert merkle.files_root((one, one)) != merkle.files_root((one,))
    assert merkle.files_root(()) == merkle.digest_of_hash(merkle.EMPTY_ROOT)


# --- checkpoints ---

POINT = merkle.Checkpoint("lumaris.example/testnet", 42, bytes(range(32)))
NOTE = merkle.sign_checkpoint(POINT, p.COORDINATOR)
KEY = p.COORDINATOR.public_key


def refused(note: str, code: str, key: bytes = KEY) -> None:
    with pytest.raises(EnvelopeError) as caught:
        merkle.open_checkpoint(note, key)
    assert caught.value.code == code


def test_a_checkpoint_goes_round() -> None:
    assert merkle.open_checkpoint(NOTE, KEY) == POINT
    assert NOTE.startswith("lumaris.example/testnet\n42\nAAEC")


def test_other_signatures_are_ignored() -> None:
    witness = merkle.sign_checkpoint(POINT, p.STRANGER).partition("\n\n")[2]
    head, _, ours = NOTE.partition("\n\n")
    assert merkle.open_checkpoint(f"{head}\n\n{witness}{ours}", KEY) == POINT
    assert merkle.open_checkpoint(f"{head}\n\n{ours}{witness}", p.STRANGER.public_key) == POINT
    refused(f"{head}\n\n{witness}", "bad_signature")


@pytest.mark.parametrize("position", range(len(NOTE)))
def test_every_changed_character_is_noticed(position: int) -> None:
    changed = NOTE[:position] + ("A" if NOTE[position] != "A" else "B") + NOTE[position + 1 :]
    if position == len(NOTE) - 1:
        changed = NOTE[:-1] + "A"
    with pytest.raises(EnvelopeError):
        merkle.open_checkpoint(changed, KEY)


@pytest.mark.parametrize("size", ["042", "-1", "4.0", "٤٢", "", "9" * 19, "x"])
def test_a_size_has_one_spelling(size: str) -> None:
    refused(NOTE.replace("\n42\n", f"\n{size}\n"), "malformed")


@pytest.mark.parametrize(
    "note",
    [
        "",
        "a\n\n",
        NOTE.partition("\n\n")[0],
        NOTE.replace("\n\n", "\nextra\n\n"),
        NOTE.replace("lumaris.example/testnet\n42", "\n42"),
        NOTE.replace("AAEC", "????"),
        NOTE.replace("AAECAwQF", ""),
    ],
)
def test_what_is_not_a_note_is_malformed(note: str) -> None:
    refused(note, "malformed")


def test_a_note_is_bounded() -> None:
    refused(NOTE + "\n" * limits.CHECKPOINT_CHARS_MAX, "oversize")
    lines = NOTE.partition("\n\n")[2] * (limits.NOTE_SIGNATURES_MAX + 1)
    refused(f"{POINT.body}\n{lines}", "oversize")


def test_the_wrong_key_name_or_blob_is_a_bad_signature() -> None:
    refused(NOTE, "bad_signature", p.STRANGER.public_key)
    head, _, line = NOTE.partition("\n\n")
    refused(f"{head}\n\n{line.replace('testnet', 'mainnet')}", "bad_signature")
    refused(f"{head}\n\n— {POINT.origin} not base64!\n", "malformed")
    blob = base64.b64decode(line.rsplit(" ", 1)[1])
    short = base64.b64encode(blob[:-1]).decode()
    refused(f"{head}\n\n— {POINT.origin} {short}\n", "bad_signature")


def test_only_a_line_feed_ends_a_signature_line() -> None:
    refused(NOTE.replace("\n\n", "\n\nx\u2028"), "malformed")
