"""Takes a guest's output folder out of the tar stream that it sends, believing nothing of it.

Only what a plain tar of plain files needs is understood: file and folder headers, and long names.
Python's own reader would first read a header's claimed size into memory, whatever it claims.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.paths import safe_parts

_BLOCK = 512
_CHUNK = 256 * limits.KIB
_LONG_NAME_BYTES_MAX = 4096
_FOLDERS_PER_FILE = limits.PATH_DEPTH_MAX
_MISPLACED = (FileExistsError, FileNotFoundError, NotADirectoryError)
_PLAIN, _OLD_PLAIN, _FOLDER, _LONG_NAME = b"0", b"\0", b"5", b"L"


def take_outputs(stream: BinaryIO, target: Path, *, files_max: int, bytes_max: int) -> None:
    """Write the stream's files below `target`, an empty folder that only we write. Blocks.

    Raises LumarisError `killed_output` for anything but plain files and folders, an unsafe name,
    or more than the bounds allow; OSError when the stream ends early.
    """
    files = folders = total = 0
    long_name = b""
    while True:
        header = _exactly(stream, _BLOCK)
        if header == bytes(_BLOCK):
            return
        size, kind = _checked(header)
        if kind == _LONG_NAME and not long_name and 0 < size <= _LONG_NAME_BYTES_MAX:
            long_name = _exactly(stream, size + -size % _BLOCK)[:size].rstrip(b"\0")
            continue
        path, long_name = _path(long_name or _short_name(header), target), b""
        if kind == _FOLDER and size == 0:
            folders += path != target
            if folders > files_max * _FOLDERS_PER_FILE:
                raise _refused("too many folders")
            try:
                path.mkdir(mode=0o755, exist_ok=True)
            except _MISPLACED as error:
                raise _refused("a folder in the place of a file, or without its own") from error
        elif kind in (_PLAIN, _OLD_PLAIN) and path != target:
            files, total = files + 1, total + size
            if files > files_max or total > bytes_max or size > limits.FILE_BYTES_MAX:
                raise _refused(f"more than {files_max} files or {bytes_max} bytes")
            _write(stream, path, size)
        else:
            raise _refused("a link or special file")


def _write(stream: BinaryIO, path: Path, size: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except _MISPLACED as error:
        raise _refused("a name twice, or without its folder") from error
    with open(descriptor, "wb") as writer:
        left = size
        while left:
            part = _exactly(stream, min(left, _CHUNK))
            writer.write(part)
            left -= len(part)
    _exactly(stream, -size % _BLOCK)


def _checked(header: bytes) -> tuple[int, bytes]:
    """Size and kind of a member, after its checksum."""
    try:
        expected = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise _refused("an unreadable header") from error
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected or size < 0:
        raise _refused("a damaged header")
    return size, header[156:157]


def _short_name(header: bytes) -> bytes:
    prefix = header[345:500].split(b"\0", 1)[0]
    name = header[:100].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _path(name: bytes, target: Path) -> Path:
    name = name.removeprefix(b"./").rstrip(b"/")
    if name in (b"", b"."):
        return target
    try:
        return target.joinpath(*safe_parts(name.decode("utf-8")))
    except (ValueError, LumarisError) as error:
        raise _refused("an unsafe name") from error


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise OSError("the machine's output ends early")
    return data


def _refused(what: str) -> LumarisError:
    return LumarisError("killed_output", f"The output holds {what}.")
