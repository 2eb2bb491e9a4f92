"""The identity key on disk: 32 bytes in hex, for nobody but its owner to read."""

from __future__ import annotations

import os
from pathlib import Path

from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair

_HEX_CHARS = 64


def read_key(path: Path) -> KeyPair:
    """The key in a file. Raises LumarisError `unsafe_key_file`, `not_found`, `config_invalid`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LumarisError("not_found", f"There is no key file {path}.") from None
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}.") from None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_mode & 0o077:
            raise LumarisError("unsafe_key_file", f"{path} can be read by other users.")
        text = file.read(_HEX_CHARS + 2).strip()
    try:
        seed = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise LumarisError("config_invalid", f"{path} does not hold a key of 32 bytes in hex.")
    return KeyPair(seed)


def write_key(path: Path, seed: bytes) -> KeyPair:
    """Save a new key; an existing file is never replaced. Raises FileExistsError."""
    key = KeyPair(seed)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(seed.hex() + "\n")
        file.flush()
        os.fsync(descriptor)
    return key


def load_or_create_key(path: Path) -> KeyPair:
    """The key in a file, a new one when there is none. Raises LumarisError as `read_key` does."""
    try:
        return write_key(path, os.urandom(32))
    except FileExistsError:
        return read_key(path)
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}.") from None
