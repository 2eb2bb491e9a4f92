"""Key lists: one root for ever, never back, keys in windows."""

from __future__ import annotations

import hashlib

import pytest
from msgspec.structs import replace

from lumaris_protocol import codec, key_list
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.key_list import TrustedKeys, is_another
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.notice import KeyList, SigningKey

NET, NOW = "devnet", 1_800_000_000


def key_of(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(name.encode()).digest())


ROOT, OLD, NEW = key_of("root"), key_of("old"), key_of("new")
LIST = KeyList(
    root=ROOT.peer_id,
    seq=2,
    keys=(
        SigningKey(peer=OLD.peer_id, not_before=0, not_after=NOW + 1_000),
        SigningKey(peer=NEW.peer_id, not_before=NOW + 100, not_after=NOW + 5_000),
    ),
    issued_at=NOW,
)


def sign(message: KeyList, key: KeyPair = ROOT) -> bytes:
    return codec.sign(message, key, NET).data


def test_a_list_is_its_roots() -> None:
    found = key_list.open_list(sign(LIST), network=NET, root=ROOT.peer_id)
    assert found.message == LIST
    assert key_list.check(sign(LIST), network=NET, now=NOW).message == LIST


@pytest.mark.parametrize(
    ("message", "signer", "code"),
    [
        (LIST, NEW, "wrong_signer"),
        (replace(LIST, root=NEW.peer_id, keys=LIST.keys[:1]), NEW, "root_changed"),
        (replace(LIST, keys=(LIST.keys[0], LIST.keys[0])), ROOT, "malformed"),
        (replace(LIST, keys=(replace(LIST.keys[0], peer=ROOT.peer_id),)), ROOT, "malformed"),
        (replace(LIST, keys=(replace(LIST.keys[0], not_after=0),)), ROOT, "malformed"),
        (replace(LIST, seq=1), ROOT, "list_stale"),
        (replace(LIST, issued_at=NOW + 1), ROOT, "list_stale"),
        (replace(LIST, seq=3, issued_at=NOW + 61), ROOT, "not_yet_valid"),
    ],
)
def test_lists_that_are_refused(message: KeyList, signer: KeyPair, code: str) -> None:
    held = codec.sign(LIST, ROOT, NET)
    with pytest.raises(EnvelopeError) as caught:
        key_list.check(sign(message, signer), network=NET, now=NOW, held=held)
    assert caught.value.code == code


def test_a_newer_list_replaces_the_held_one_and_the_same_keeps_it() -> None:
    held = codec.sign(LIST, ROOT, NET)
    newer = replace(LIST, seq=7)
    assert key_list.check(sign(newer), network=NET, now=NOW, held=held).message == newer
    assert key_list.check(sign(LIST), network=NET, now=NOW, held=held) is held


@pytest.mark.parametrize(
    ("now", "valid", "newest"),
    [
        (NOW, {OLD}, OLD),
        (NOW + 50, {OLD, NEW}, OLD),  # what others sign early counts, we do not sign early
        (NOW + 100, {OLD, NEW}, NEW),
        (NOW + 1_060, {OLD, NEW}, NEW),
        (NOW + 1_061, {NEW}, NEW),
        (NOW + 5_061, set(), None),
    ],
)
def test_keys_count_in_their_windows(now: int, valid: set[KeyPair], newest: KeyPair | None) -> None:
    assert key_list.valid(LIST, now=now) == {key.peer_id for key in valid}
    assert key_list.newest(LIST, now=now) == (newest.peer_id if newest else None)


def test_a_revoked_key_counts_no_more() -> None:
    old, new = LIST.keys
    message = replace(LIST, keys=(replace(old, revoked_at=NOW + 10), new))
    assert key_list.valid(message, now=NOW + 9) == {OLD.peer_id}
    assert key_list.valid(message, now=NOW + 10) == frozenset()
    assert key_list.newest(message, now=NOW + 200) == NEW.peer_id


class Now:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.at = float(NOW)

    def __call__(self) -> float:
        return self.at


def trusting(now: Now, data: bytes = b"", first: KeyPair = OLD) -> TrustedKeys:
    return TrustedKeys(first.peer_id, network=NET, clock=now, data=data)


def test_the_first_key_counts_alone_until_a_list_is_known() -> None:
    now = Now()
    trusted = trusting(now)
    assert set(trusted) == {OLD.peer_id}
    assert (trusted.roots, trusted.data) == (frozenset(), b"")
    assert trusted.learn(sign(LIST))
    assert not trusted.learn(sign(LIST))
    assert trusted.roots == {ROOT.peer_id}
    assert (NEW.peer_id in trusted, len(trusted)) == (False, 1)
    now.at += 100
    assert set(trusted) == {OLD.peer_id, NEW.peer_id}
    now.at += 1_000
    assert set(trusted) == {NEW.peer_id}
    assert trusted.ever == {OLD.peer_id, NEW.peer_id}
    assert set(trusting(now, trusted.data)) == {NEW.peer_id}


def test_a_first_list_must_name_the_key_that_was_met() -> None:
    trusted = trusting(Now(), first=key_of("other"))
    with pytest.raises(EnvelopeError, match="does not name its coordinator"):
        trusted.learn(sign(LIST))
    assert trusted.data == b""


def test_a_rotated_key_is_the_same_coordinator_a_new_root_is_refused() -> None:
    now = Now()
    now.at += 200
    trusted = trusting(now, sign(LIST))
    trusted.meet(NEW.peer_id, sign(replace(LIST, seq=3)))
    other = key_of("another root")
    forged = sign(replace(LIST, root=other.peer_id, seq=9), other)
    for data, coordinator, code in (
        (forged, NEW, "root_changed"),
        (sign(LIST), NEW, "list_stale"),
        (b"", NEW, "list_stale"),
        (sign(replace(LIST, seq=4)), key_of("stranger"), "wrong_signer"),
    ):
        with pytest.raises(EnvelopeError) as caught:
            trusted.meet(coordinator.peer_id, data)
        assert caught.value.code == code
    assert not is_another(forged, trusted, coordinator=NEW.peer_id, network=NET)


def test_a_coordinator_set_up_anew_is_another() -> None:
    trusted = trusting(Now(), sign(LIST))
    root, key = key_of("root 2"), key_of("key 2")
    only = SigningKey(peer=key.peer_id, not_before=0, not_after=NOW + 1)
    fresh = sign(KeyList(root=root.peer_id, seq=1, keys=(only,), issued_at=NOW), root)
    assert is_another(fresh, trusted, coordinator=key.peer_id, network=NET)
    assert is_another(b"", trusted, coordinator=key.peer_id, network=NET)
    assert not is_another(b"", trusted, coordinator=OLD.peer_id, network=NET)
    assert not is_another(fresh, trusted, coordinator=OLD.peer_id, network=NET)
