"""Names of files that a stranger chose: what may become a path on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.execution import File


def safe_parts(text: str) -> tuple[str, ...]:
    """The parts of a path that is relative, normalised and within the limits.

    Raises LumarisError `bad_input`.
    """

    def refuse(why: str) -> LumarisError:
        return LumarisError("bad_input", f"The file name {text[:80]!r} {why}.")

    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise refuse("is not text") from error
    if not text or size > limits.PATH_CHARS_MAX:
        raise refuse(f"is empty or longer than {limits.PATH_CHARS_MAX} bytes")
    if any(ord(char) < 32 or ord(char) == 127 for char in text) or "\\" in text:
        raise refuse("has a control character or a backslash")
    parts = tuple(text.split("/"))
    if len(parts) > limits.PATH_DEPTH_MAX:
        raise refuse(f"is deeper than {limits.PATH_DEPTH_MAX} folders")
    if any(part in ("", ".", "..") for part in parts):
        raise refuse("is absolute or not normalised")
    return parts


def check_tree(files: Sequence[File], *, bytes_max: int) -> None:
    """Check that files can lie in one folder: safe names, none twice, none inside another.

    Raises LumarisError `bad_input`, also when they are larger than `bytes_max` together.
    """
    if sum(file.size_bytes for file in files) > bytes_max:
        raise LumarisError("bad_input", f"The files are larger than {bytes_max} bytes together.")
    names = [safe_parts(file.path) for file in files]
    folders = {parts[:depth] for parts in names for depth in range(1, len(parts))}
    if len(set(names)) != len(names) or folders.intersection(names):
        raise LumarisError("bad_input", "Two of the files have the same name.")
