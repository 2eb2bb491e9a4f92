"""What a machine says to us, with no machine: its tar of /out, and its streams with their mark."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lumaris_node.executors.vm.machine import LINE_BYTES_MAX, LineReader, MarkedStream
from lumaris_node.executors.vm.output import take_outputs
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import file, folder, hardlink, other, pack, symlink

MARK = b"0123456789abcdef"


def take(data: bytes, target: Path, *, files_max: int = 3, bytes_max: int = 1000) -> None:
    take_outputs(io.BytesIO(data), target, files_max=files_max, bytes_max=bytes_max)


def gnu(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return pack(*members, form=tarfile.GNU_FORMAT)


def test_plain_files_and_folders(tmp_path: Path):
    deep = "d/" + "n" * 120
    take(
        gnu(folder("./"), file("./a", b"x" * 513, 0o4777), folder("d"), file(deep, b"y")), tmp_path
    )
    assert (tmp_path / "a").read_bytes() == b"x" * 513
    assert (tmp_path / deep).read_bytes() == b"y"
    assert (tmp_path / "a").stat().st_mode & 0o7111 == 0


@pytest.mark.parametrize(
    "members",
    [
        (symlink("a", "/etc/shadow"),),
        (file("a", b"x"), hardlink("b", "a")),
        (other("a", tarfile.FIFOTYPE),),
        (other("a", tarfile.CHRTYPE),),
        (other("a", tarfile.GNUTYPE_SPARSE),),
        (file("../a", b"x"),),
        (file("/a", b"x"),),
        (file("d/../../a", b"x"),),
        (file("no/folder", b"x"),),
        (file("a\nb", b"x"),),
        (file("a", b"x"), file("a", b"y")),
        (file("a", b"x"), folder("a"), file("a/b", b"y")),
        (file("a"), file("b"), file("c"), file("d")),
        (file("a", bytes(600)), file("b", bytes(600))),
        (file("n" * 5000, b"x"),),
        tuple(folder(f"d{number}") for number in range(100)),
    ],
)
def test_what_is_refused(members: tuple[tuple[tarfile.TarInfo, bytes], ...], tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(LumarisError) as caught:
        take(gnu(*members), target)
    assert caught.value.code == "killed_output"
    assert os.listdir(tmp_path) == ["out"]
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_a_claimed_size_costs_nothing(tmp_path: Path):
    item = tarfile.TarInfo("a")
    item.size = 1 << 40
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        item.type = kind
        with pytest.raises(LumarisError):
            take(item.tobuf(tarfile.GNU_FORMAT), tmp_path)


def test_a_stream_that_ends_early(tmp_path: Path):
    with pytest.raises(OSError, match="early"):
        take(gnu(file("a", bytes(700)))[:800], tmp_path)


@given(st.binary(max_size=1024))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    target = tmp_path_factory.getbasetemp()
    before = sorted(os.listdir(target))
    with pytest.raises((LumarisError, OSError)):
        take(b"\1" + data, target)
    assert sorted(os.listdir(target)) == before


class Pieces:
    """A stream that hands out prepared pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    async def receive_some(self, _size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""


@given(
    st.lists(st.sampled_from([b"x", MARK[:3], MARK[:15], MARK[5:], b"0", b"long" * 9])),
    st.lists(st.integers(0, 60), max_size=8),
    st.booleans(),
)
def test_a_stream_ends_at_its_mark(said: list[bytes], cuts: list[int], marked: bool):
    text = b"".join(said).replace(MARK, b"")
    whole = text + (MARK + b"after" if marked else b"")
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in itertools.pairwise(edges)]

    async def read() -> bytes:
        stream, got = MarkedStream(Pieces(*pieces), MARK), b""  # type: ignore[arg-type]
        while part := await stream.receive():
            got += part
        return got

    expected = whole[: whole.index(MARK)] if MARK in whole else whole
    assert trio.run(read) == expected


async def test_what_is_said_is_passed_on_at_once():
    stream = MarkedStream(Pieces(b"prompt> ", b"abc01"), MARK)  # type: ignore[arg-type]
    assert await stream.receive() == b"prompt> "
    assert await stream.receive() == b"abc"
    assert await stream.receive() == b"01"
    assert await stream.receive() == b""


async def test_an_endless_line_is_the_end():
    endless = [b"x" * 4096] * (LINE_BYTES_MAX // 4096 + 2)
    assert await LineReader(Pieces(*endless)).line() is None  # type: ignore[arg-type]
    reader = LineReader(Pieces(b"a", b"b\nc\n"))  # type: ignore[arg-type]
    assert [await reader.line(), await reader.line(), await reader.line()] == [b"ab", b"c", None]
