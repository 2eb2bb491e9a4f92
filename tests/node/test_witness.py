"""A node's witness: what it signs is on disk first, and nobody wears it out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from lumaris_node.witness import FILE_NAME, Witness
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.simulated.stream import stream_pair
from lumaris_protocol import codec, merkle, notes, witnessing
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.notice import CheckpointNotice
from lumaris_protocol.protocols import WITNESS
from lumaris_protocol.witnessing import Submission, WitnessAsk, WitnessReply
from tests import independent_log as other

NETWORK = "devnet"
COORDINATOR, NODE, STRANGER = (KeyPair(bytes([seed]) * 32) for seed in (1, 2, 3))
TRUE = merkle.Tree(merkle.leaf_hash(str(n).encode()) for n in range(64))
FALSE = merkle.Tree(merkle.leaf_hash(b"x%d" % n) for n in range(64))


def head(size: int, tree: merkle.Tree = TRUE, key: KeyPair = COORDINATOR) -> str:
    point = merkle.Checkpoint(notes.log_origin(NETWORK), size, tree.root(size))
    return merkle.sign_checkpoint(point, key)


def ask(old: int, size: int, tree: merkle.Tree = TRUE) -> WitnessAsk:
    path = tree.consistency_proof(old, size) if 0 < old < size else []
    found = Submission(old, tuple(path), head(size, tree))
    return WitnessAsk(op="cosign", body=witnessing.encode_submission(found))


def make(folder: Path) -> Witness:
    return Witness(
        NODE,
        network=NETWORK,
        folder=folder,
        coordinators=lambda: frozenset({COORDINATOR.peer_id}),
        clock=time.time,
    )


@asynccontextmanager
async def street(witness: Witness, asker: KeyPair) -> AsyncIterator[FramedStream]:
    """One stream from a peer to the witness."""
    async with trio.open_nursery() as nursery:
        ours, theirs = stream_pair(asker.peer_id, NODE.peer_id, WITNESS)
        nursery.start_soon(witness.serve, theirs)
        yield FramedStream(ours)
        await ours.aclose()


async def tell(witness: Witness, asked: WitnessAsk, asker: KeyPair = COORDINATOR) -> WitnessReply:
    async with street(witness, asker) as framed:
        await framed.send(Kind.HEADER, msgspec.json.encode(asked))
        try:
            return await framed.expect_header(WitnessReply)
        except LumarisError as error:
            found = error
    raise found


async def test_it_signs_with_its_own_key_and_tells_what_it_signed(tmp_path: Path) -> None:
    witness = make(tmp_path)
    assert await tell(witness, WitnessAsk(op="latest")) == WitnessReply(state="latest")
    answer = await tell(witness, ask(0, 5))
    assert answer.state == "cosigned"
    assert list(other.cosigners(answer.note, NETWORK)) == [NODE.peer_id]
    latest = await tell(witness, WitnessAsk(op="latest"), STRANGER)
    assert latest == WitnessReply(state="latest", note=answer.note)


async def test_what_it_signed_is_on_disk_before_anybody_has_it(tmp_path: Path) -> None:
    """Killed at any moment, it never signs a second history."""
    answer = await tell(make(tmp_path), ask(0, 5))
    assert (await tell(make(tmp_path), WitnessAsk(op="latest"))).note == answer.note
    again = await tell(make(tmp_path), ask(0, 7, FALSE))
    assert (again.state, again.note) == ("elsewhere", answer.note)
    assert os.stat(tmp_path / FILE_NAME).st_mode & 0o777 == 0o600


async def test_without_a_disk_it_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    witness = make(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("lumaris_node.witness.write_private_file", full)
        with pytest.raises(RefusedError, match="No space"):
            await tell(witness, ask(0, 5))
    assert (await tell(witness, WitnessAsk(op="latest"))).note == ""
    assert (await tell(witness, ask(0, 5))).state == "cosigned"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"origin":"another/log"}', b"[]"])
async def test_a_memory_that_cannot_be_read_is_not_started_anew(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    witness = make(tmp_path)
    with pytest.raises(RefusedError, match="cannot be read"):
        await tell(witness, ask(0, 5))
    assert witness.status()["readable"] is False
    assert (tmp_path / FILE_NAME).read_bytes() == content


async def test_a_fork_is_kept_and_reported(tmp_path: Path) -> None:
    witness = make(tmp_path)
    await tell(witness, ask(0, 5))
    answer = await tell(witness, ask(5, 5, FALSE), STRANGER)
    assert answer.state == "inconsistent"
    assert make(tmp_path).status() == {
        "log_size": 5,
        "forks": 1,
        "unproven": 0,
        "readable": True,
    }
    (found,) = json.loads((tmp_path / FILE_NAME).read_text())["evidence"]
    for note, tree in ((found["first"], TRUE), (found["second"], FALSE)):
        opened = other.open_head(note, notes.log_origin(NETWORK), COORDINATOR.public_key)
        assert opened == (5, tree.root(5))


async def test_a_strangers_bad_proof_accuses_nobody(tmp_path: Path) -> None:
    witness = make(tmp_path)
    await tell(witness, ask(0, 5))
    lie = Submission(5, (bytes(32),), head(9))
    asked = WitnessAsk(op="cosign", body=witnessing.encode_submission(lie))
    assert (await tell(witness, asked, STRANGER)).state == "inconsistent"
    assert witness.status()["unproven"] == 0
    assert (await tell(witness, asked, COORDINATOR)).state == "inconsistent"
    assert witness.status()["unproven"] == 1
    assert (await tell(witness, ask(5, 9), STRANGER)).state == "cosigned"


async def test_the_gossip_is_compared(tmp_path: Path) -> None:
    witness = make(tmp_path)

    def notice(note: str, key: KeyPair = COORDINATOR) -> bytes:
        message = CheckpointNotice(seq=1, checkpoint=note, issued_at=1)
        return codec.sign(message, key, NETWORK).data

    witness.observe_notice(notice(head(5)))
    witness.observe_notice(notice(head(9)))
    assert witness.status()["forks"] == 0
    witness.observe_notice(notice(head(5, FALSE), STRANGER))
    assert witness.status()["forks"] == 1
    for bad in (notice(head(5, FALSE, STRANGER)), notice("x"), b"x"):
        with pytest.raises(EnvelopeError):
            witness.observe_notice(bad)
    assert make(tmp_path).status()["forks"] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", "malformed"),
        (b'{"op":"cosign"}', "malformed"),
        (b'{"op":"other"}', "malformed"),
        (b'{"op":"cosign","body":"old 0\\n\\nx"}', "malformed"),
        (b'{"op":"latest","body":"' + b"x" * 20_000 + b'"}', "malformed"),
        (b"[" * 10_000, "malformed"),
        (
            msgspec.json.encode(
                WitnessAsk(
                    op="cosign",
                    body=witnessing.encode_submission(Submission(0, (), head(5, key=STRANGER))),
                )
            ),
            "bad_signature",
        ),
    ],
)
async def test_bad_requests_are_refused_and_leave_nothing(
    tmp_path: Path, body: bytes, code: str
) -> None:
    witness = make(tmp_path)
    async with street(witness, STRANGER) as framed:
        await framed.send(Kind.HEADER, body)
        with pytest.raises(LumarisError) as caught:
            await framed.expect_header(WitnessReply)
    assert caught.value.code == code
    assert not (tmp_path / FILE_NAME).exists()


async def test_a_silent_asker_is_let_go(tmp_path: Path, autojump_clock: object) -> None:
    async with street(make(tmp_path), STRANGER) as framed:
        assert await framed.receive() is None


async def test_one_peer_does_not_wear_it_out(tmp_path: Path) -> None:
    witness = make(tmp_path)
    codes = []
    for _ in range(30):
        try:
            await tell(witness, WitnessAsk(op="latest"), STRANGER)
        except RefusedError as error:
            codes.append(error.code)
    assert codes
    assert set(codes) == {"not_accepting"}
    assert (await tell(witness, ask(0, 5))).state == "cosigned"


async def test_strangers_take_no_turns_of_the_log(tmp_path: Path) -> None:
    witness = make(tmp_path)
    refused = 0
    for seed in range(10, 16):
        for _ in range(10):
            try:
                await tell(witness, WitnessAsk(op="latest"), KeyPair(bytes([seed]) * 32))
            except LumarisError:
                refused += 1
    assert refused == 10  # those of all strangers together
    assert (await tell(witness, ask(0, 5))).state == "cosigned"
