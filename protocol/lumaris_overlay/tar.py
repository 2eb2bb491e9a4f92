"""Reading tar archives that a stranger packed: ustar, pax and GNU long names, front to back.

The standard library's reader keeps every member, reads headers of any size into memory and has
its own view of sparse files; here a header costs at most a bound, and what is odd is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from lumaris_protocol.errors import LumarisError

BLOCK_BYTES: Final = 512
# Long names and pax records of one member; a path of Linux has at most 4 KiB.
_HEADER_BYTES_MAX = 64 * 1024
_EXTENSIONS_MAX = 4  # headers before one member: a long name, a long link, pax; one to spare
_PATH_BYTES_MAX = 4096
_TIME_DIGITS_MAX = 10
_CHUNK_BYTES = 1024 * 1024

Kind = Literal["file", "folder", "symlink", "hardlink", "special"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "special",
    b"4": "special",
    b"5": "folder",
    b"6": "special",
}


class Reader(Protocol):
    """Bytes from the front to the back."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; b"" at the end only."""
        ...


@dataclass(frozen=True)
class Member:
    """One name in an archive. `link` is the target of a link, as it stands there.

    `modified_s` counts from 1970; 0 when what stands there is no such time.
    """

    name: str
    kind: Kind
    size: int
    mode: int
    link: str = ""
    modified_s: int = 0


def unsafe(why: str) -> LumarisError:
    """An archive is refused."""
    return LumarisError("unsafe_archive", f"The archive {why}. Nothing of it was kept.")


class TarReader:
    """The members of an archive, and the bytes of the one that was read last.

    Raises LumarisError `unsafe_archive` for what is no tar, or holds sparse or unknown members.
    """

    def __init__(self, source: Reader, *, members_max: int) -> None:
        self._source, self._members_max = source, members_max
        self._left = self._padding = 0  # of the current member
        self.offset = 0  # where the next unread byte is

    def __iter__(self) -> Iterator[Member]:
        seen = 0
        while (member := self._next()) is not None:
            seen += 1
            if seen > self._members_max:
                raise unsafe(f"has more than {self._members_max} members")
            yield member

    def data(self) -> Iterator[bytes]:
        """What is left of the current member's bytes, in pieces."""
        while self._left:
            piece = self._take(min(self._left, _CHUNK_BYTES))
            self._left -= len(piece)
            yield piece

    def read(self, size_max: int) -> bytes:
        """All bytes of the current member. Raises `unsafe_archive` when there are more."""
        if self._left > size_max:
            raise unsafe("has a description that is too large")
        return b"".join(self.data())

    def _next(self) -> Member | None:
        extra: dict[str, str] = {}
        for _ in range(_EXTENSIONS_MAX + 1):
            header = self._header()
            if header is None:
                if extra:
                    raise unsafe("ends after half a member")
                return None
            flag, size = header[156:157], _number(header[124:136])
            if flag not in (b"x", b"g", b"L", b"K"):
                return self._member(header, flag, size, extra)
            if size > _HEADER_BYTES_MAX:
                raise unsafe("has a header that is too large")
            self._left, self._padding = size, -size % BLOCK_BYTES
            body = b"".join(self.data())
            if flag == b"g":
                if _pax(body).keys() & {"path", "linkpath", "size"}:
                    raise unsafe("gives all its members one name or size")
            elif flag == b"x":
                extra.update(_pax(body))
            else:
                extra["path" if flag == b"L" else "linkpath"] = _text(body.rstrip(b"\0"))
        raise unsafe("has too many headers before a member")

    def _member(self, header: bytes, flag: bytes, size: int, extra: dict[str, str]) -> Member:
        if flag not in _KINDS or any(key.startswith("GNU.sparse") for key in extra):
            raise unsafe("has a sparse file or a member of an unknown kind")
        name = _text(header[:100].partition(b"\0")[0])
        prefix = _text(header[345:500].partition(b"\0")[0])
        if header[257:263] == b"ustar\0" and prefix:
            name = f"{prefix}/{name}"
        name = extra.get("path", name)
        link = extra.get("linkpath", _text(header[157:257].partition(b"\0")[0]))
        kind = _KINDS[flag]
        if kind == "file" and name.endswith("/"):
            kind = "folder"  # of before there was a flag for them
        if "size" in extra:
            size = _decimal(extra["size"])
        if kind != "file" and size and not (kind == "hardlink" and flag == b"1"):
            raise unsafe("has a link or a folder with contents")
        if kind == "hardlink":
            size = 0  # some write the size of what is linked, but no bytes
        if len(name.encode(errors="surrogateescape")) > _PATH_BYTES_MAX or "\0" in name + link:
            raise unsafe("has a name that is too long or no name")
        self._left, self._padding = size, -size % BLOCK_BYTES
        modified_s = _seconds(header[136:148], extra.get("mtime", ""))
        return Member(name, kind, size, _number(header[100:108]) & 0o7777, link, modified_s)

    def _header(self) -> bytes | None:
        """The next block that is a header; None at the archive's end."""
        for _ in self.data():
            pass
        self._take(self._padding)
        self._padding = 0
        header = self._source.read(BLOCK_BYTES)
        while 0 < len(header) < BLOCK_BYTES and (
            more := self._source.read(BLOCK_BYTES - len(header))
        ):
            header += more
        self.offset += len(header)
        if not header or header == bytes(BLOCK_BYTES):
            return None
        if len(header) < BLOCK_BYTES:
            raise unsafe("is cut off")
        total = sum(header[:148]) + 8 * 0x20 + sum(header[156:])
        if _number(header[148:156]) != total:
            raise unsafe("is no tar, or is damaged")
        return header

    def _take(self, size: int) -> bytes:
        """Exactly so many bytes; at most a chunk is asked for."""
        found = self._source.read(size) if size else b""
        while len(found) < size:
            more = self._source.read(size - len(found))
            if not more:
                raise unsafe("is cut off")
            found += more
        self.offset += size
        return found


def _number(field: bytes) -> int:
    """An octal number, or a large one in base 256; never negative."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise unsafe("has a size that is not accepted")
        value = int.from_bytes(field[1:], "big")
        if value >= 1 << 62:
            raise unsafe("has a size that is not accepted")
        return value
    text = field.partition(b"\0")[0].strip(b" ")
    if text.strip(b"01234567"):
        raise unsafe("is no tar, or is damaged")
    return int(text, 8) if text else 0


def _seconds(field: bytes, text: str) -> int:
    """A time in whole seconds, of a pax record if there is one."""
    whole = text.partition(".")[0]
    if whole.isascii() and whole.isdecimal() and len(whole) <= _TIME_DIGITS_MAX:
        return int(whole)
    octal = field.strip(b" \0")
    return 0 if octal.strip(b"01234567") or not octal else int(octal, 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise unsafe("has a size that is not accepted")
    return int(text)


def _text(field: bytes) -> str:
    return field.decode(errors="surrogateescape")


def _pax(body: bytes) -> dict[str, str]:
    """The records of a pax header: "<length> <key>=<value>\\n", each."""
    found: dict[str, str] = {}
    at = 0
    while at < len(body):
        digits, space, _ = body[at : at + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = body[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length > len(body) or not equals or value[-1:] != b"\n":
            raise unsafe("has a damaged header")
        found[_text(key)] = _text(value[:-1])
        at += length
    return found
