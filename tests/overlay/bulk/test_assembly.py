"""The receiver's bookkeeping, driven by hand: orders of arrival, second asks, lists."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris_overlay.bulk.assembly import Assembly, Dropped
from lumaris_overlay.bulk.part import chunk_list, open_part
from lumaris_overlay.bulk.wire import Cut, Wire
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import CHUNK_BYTES
from tests.overlay.bulk.world import chunks, digest

DATA = chunks(10, 5)


@pytest.fixture
def assembly(tmp_path: Path) -> Iterator[Assembly]:
    part = open_part(tmp_path / "file", sha256=digest(DATA), size_bytes=len(DATA))
    assembly = Assembly(part, sources=3)
    yield assembly
    assembly.close()
    part.keep(0)


def right_list(tmp_path: Path) -> bytes:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    with source.open("rb") as file:
        return chunk_list(file.fileno(), len(DATA))


class Given(Wire):
    """A wire that is given its bytes."""

    def __init__(self, data: bytes) -> None:
        near, far = socket.socketpair()
        near.close()
        super().__init__(far)
        self._data = data

    def receive(self, view: memoryview) -> None:
        view[:], self._data = self._data[: len(view)], self._data[len(view) :]


def give(assembly: Assembly, source: int, index: int, *, wrong: bool = False) -> None:
    data = DATA[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
    wire = Given(bytes(len(data)) if wrong else data)
    assembly.receive(wire, source, index, 1)
    wire.close()
    assembly.leave(9)  # comes back when everything so far was taken in


def test_the_list_ends_in_the_files_own_hash(tmp_path: Path):
    listed = right_list(tmp_path)
    assert len(listed) == 11 * 32
    assert f"sha256:{listed[-32:].hex()}" == digest(DATA)
    assert f"sha256:{listed[:32].hex()}" == digest(DATA[:CHUNK_BYTES])


@pytest.mark.parametrize(
    "order", [range(11), range(10, -1, -1), [5, 4, 6, 3, 7, 2, 8, 1, 9, 0, 10]]
)
def test_chunks_in_any_order(assembly: Assembly, order: list[int]):
    for index in order:
        give(assembly, index % 3, index)
    assert assembly.complete
    assert assembly.received == 11
    assert assembly.take(0, wait=True) is None


def test_ranges_and_second_asks(assembly: Assembly):
    assert assembly.take(0, wait=False) == (0, 8)
    assert assembly.take(1, wait=False) == (8, 3)
    assert assembly.take(2, wait=False) is None
    assert assembly.take(2, wait=True) == (10, 1)
    assert assembly.take(2, wait=True) == (9, 1)
    give(assembly, 2, 10)
    give(assembly, 1, 10)  # the second copy does not count
    assert assembly.received == 1
    assembly.leave(1)
    assert assembly.take(2, wait=True) == (8, 2)
    assembly.leave(0)
    assert assembly.take(1, wait=True) == (0, 8)


def test_a_source_that_leaves_lets_others_ask_again(assembly: Assembly):
    assembly.take(0, wait=False)
    assembly.take(1, wait=False)
    assert assembly.take(2, wait=True) == (10, 1)
    assembly.leave(2)
    assembly.join(2)
    assert assembly.take(2, wait=True) == (10, 1)


def test_a_wrong_chunk_costs_its_source_all_that_is_not_proven(assembly: Assembly, tmp_path: Path):
    assembly.follow(right_list(tmp_path))
    give(assembly, 0, 0)
    give(assembly, 1, 3)
    give(assembly, 1, 2, wrong=True)
    give(assembly, 0, 4)
    assert assembly.received == 4  # nobody knows yet
    give(assembly, 0, 1)
    assert (assembly.frontier, assembly.received) == (2, 3)
    with pytest.raises(Dropped):
        assembly.take(1, wait=False)
    give(assembly, 0, 2)
    give(assembly, 0, 3)
    assert assembly.frontier == 5


def test_a_new_list_forgets_only_what_it_denies(assembly: Assembly, tmp_path: Path):
    right = right_list(tmp_path)
    wrong = right[: 3 * 32] + bytes(32 * 7) + right[-32:]
    assembly.follow(wrong)
    for index in range(3):
        give(assembly, 0, index)
    give(assembly, 0, 3)  # right, but the list says otherwise
    assert assembly.frontier == 3
    assembly.follow(right)
    assert assembly.frontier == 3
    assembly.follow(bytes(32 * 10) + right[-32:])
    assert assembly.frontier == 0


def test_a_wrong_file_without_a_list(tmp_path: Path):
    part = open_part(tmp_path / "file", sha256=digest(DATA), size_bytes=len(DATA))
    assembly = Assembly(part)
    for index in range(11):
        give(assembly, 0, index, wrong=index == 4)
    with pytest.raises(RefusedError, match="output_mismatch"):
        assembly.take(0, wait=True)
    assembly.close()
    part.keep(0)
    assert list(tmp_path.iterdir()) == []


def test_every_call_ends_when_it_is_given_up(assembly: Assembly):
    assembly.halt(1)
    with pytest.raises(Cut):
        assembly.take(1, wait=True)
    assembly.join(1)
    assert assembly.take(1, wait=True) == (0, 8)
    assembly.give_up()
    wire = Given(DATA)
    for _ in range(30):
        with pytest.raises(Cut):
            assembly.receive(wire, 0, 0, 1)
    wire.close()
    with pytest.raises(Cut):
        assembly.wait()


def test_nobody_is_held_to_the_list_of_another(assembly: Assembly, tmp_path: Path):
    listed = right_list(tmp_path)
    false = listed[: 2 * 32] + bytes(32) + listed[3 * 32 :]
    assembly.follow(listed)
    give(assembly, 0, 0)
    give(assembly, 0, 2)  # waits for the one before it
    assembly.follow(false)
    give(assembly, 1, 1)
    give(assembly, 1, 2)  # its own list denies it
    with pytest.raises(Dropped):
        assembly.take(1, wait=False)
    assembly.follow(listed)
    for index in range(2, 11):
        give(assembly, 0, index)
    assert assembly.complete
