"""File names from strangers."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.paths import safe_parts


@pytest.mark.parametrize("text", ["a", "a/b.txt", "...", "ü/日本", "a b", "-rf", "C:x", "~"])
def test_plain_names_pass(text: str) -> None:
    assert safe_parts(text) == tuple(text.split("/"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "/etc/passwd", "..", "../a", "a/..", "a/../b", ".", "a/./b", "a//b", "a/"),
        *("a\0b", "a\nb", "a\x7f", "a\\b", "\ud800", "x" * 256, "ü" * 128),
        "/".join("x" * (limits.PATH_DEPTH_MAX + 1)),
    ],
)
def test_names_that_could_leave_their_folder_are_refused(text: str) -> None:
    with pytest.raises(LumarisError, match="bad_input"):
        safe_parts(text)


def test_the_limits_themselves_pass() -> None:
    assert len(safe_parts("/".join("x" * limits.PATH_DEPTH_MAX))) == limits.PATH_DEPTH_MAX
    assert safe_parts("x" * limits.PATH_CHARS_MAX)


@given(st.text(alphabet="ab./\\\n\0ü~", max_size=40))
def test_whatever_passes_stays_inside(text: str) -> None:
    try:
        parts = safe_parts(text)
    except LumarisError:
        return
    path = PurePosixPath("/inside").joinpath(*parts)
    assert path.is_relative_to("/inside")
    assert str(path) == f"/inside/{text}"
    assert ".." not in path.parts
