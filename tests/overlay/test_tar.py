"""The reader of archives agrees with the standard library's on everything it takes."""

from __future__ import annotations

import tarfile
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_overlay.tar import TarReader
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import file, folder, hardlink, pack, symlink

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_KINDS = {b"0": "file", b"5": "folder", b"2": "symlink", b"1": "hardlink"}


def seen_by_us(raw: bytes) -> list[tuple[object, ...]]:
    tar = TarReader(BytesIO(raw), members_max=100)
    return [
        (item.name.rstrip("/"), item.kind, item.mode, item.link, b"".join(tar.data()))
        for item in tar
    ]


def seen_by_python(raw: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=BytesIO(raw)) as tar:
        found: list[tuple[object, ...]] = []
        for item in tar:
            data = tar.extractfile(item) if item.isreg() else None
            content = data.read() if data is not None else b""
            found.append((item.name, _KINDS[item.type], item.mode, item.linkname, content))
        return found


@pytest.mark.parametrize("form", FORMS)
def test_all_formats(form: int) -> None:
    deep = "/".join(["folder"] * 20)
    raw = pack(
        file("a", b"x" * 1000, 0o755),
        folder("d"),
        file(f"{deep}/file", b"y"),
        symlink("s", "a"),
        hardlink("h", "a"),
        form=form,
    )
    assert seen_by_us(raw) == seen_by_python(raw)


@pytest.mark.parametrize("form", FORMS[1:])
def test_long_names_and_links(form: int) -> None:
    raw = pack(file("n" * 300, b"1"), symlink("s" * 200, "t" * 300), file("ü/ñ", b"2"), form=form)
    assert seen_by_us(raw) == seen_by_python(raw)


@given(raw=st.binary(max_size=3000), at=st.integers(0, 2500), keep=st.booleans())
def test_any_bytes_are_read_or_refused(raw: bytes, at: int, keep: bool) -> None:
    whole = pack(file("a", b"1" * 600), symlink("b", "a"))
    damaged = whole[:at] + raw + (whole[at + len(raw) :] if keep else b"")
    try:
        seen_by_us(damaged)
    except LumarisError as error:
        assert error.code == "unsafe_archive"  # noqa: PT017 - either is right
