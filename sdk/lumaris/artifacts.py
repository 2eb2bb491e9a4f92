"""Files in and out: hashed before they leave, checked before they are believed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import trio

from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.execution import File
from lumaris_protocol.paths import safe_parts

_READ_BYTES = limits.MIB


async def describe_inputs(inputs: Mapping[str, Path]) -> tuple[File, ...]:
    """The manifest of local files under their guest paths. Raises LumarisError `bad_input`."""
    if len(inputs) > limits.INPUT_FILES_MAX:
        raise LumarisError(
            "bad_input", f"{len(inputs)} inputs; {limits.INPUT_FILES_MAX} are allowed."
        )
    files = []
    for path, source in inputs.items():
        safe_parts(path)
        size_bytes, sha256 = await trio.to_thread.run_sync(hash_file, source)
        files.append(File(path=path, size_bytes=size_bytes, sha256=sha256))
    if sum(file.size_bytes for file in files) > limits.INPUT_BYTES_MAX:
        raise LumarisError("bad_input", "The inputs are too large together.")
    return tuple(files)


def hash_file(source: Path) -> tuple[int, str]:
    """Size and digest of a local file. Raises LumarisError `bad_input`."""
    hasher, size = hashlib.sha256(), 0
    try:
        with source.open("rb") as file:
            while data := file.read(_READ_BYTES):
                hasher.update(data)
                size += len(data)
    except OSError as error:
        raise LumarisError("bad_input", f"{source}: {error.strerror}") from None
    if size > limits.FILE_BYTES_MAX:
        raise LumarisError("bad_input", f"{source} is larger than a file may be.")
    return size, f"sha256:{hasher.hexdigest()}"


async def make_target(folder: Path, path: str) -> Path:
    """Where a delivered file goes, inside `folder`. Raises LumarisError or OSError."""
    target = folder.joinpath(*safe_parts(path))
    await trio.Path(target.parent).mkdir(parents=True, exist_ok=True)
    return target
