"""Names of files that a stranger chose: what may become a path on this machine."""

from __future__ import annotations

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError


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
