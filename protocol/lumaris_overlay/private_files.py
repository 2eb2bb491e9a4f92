"""What belongs to one user alone: state folders (0700), identity keys and records (0600)."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair

_SEED_BYTES = 32
_HEX_CHARS = 2 * _SEED_BYTES


def make_private_folder(folder: Path) -> None:
    """Create a folder only this user can enter. Raises LumarisError `not_writable`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise LumarisError("not_writable", f"{folder}: {error.strerror}") from None
    if not writable:
        raise LumarisError("not_writable", f"{folder} cannot be written.")


def write_private_file(path: Path, data: bytes) -> None:
    """Replace a file that only this user can read; a crash leaves the old one or the new one.

    Raises OSError.
    """
    draft = _write_draft(path, data)
    try:
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read_key(path: Path) -> KeyPair:
    """The key in a file: 32 bytes in hex, for nobody but its owner to read.

    Raises LumarisError `unsafe_key_file`, `not_found` or `config_invalid`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LumarisError("not_found", f"There is no key file {path}.") from None
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise LumarisError("unsafe_key_file", f"{path} can be read by other users.")
        text = file.read(_HEX_CHARS + 2).strip()
    try:
        seed = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        seed = b""
    if len(seed) != _SEED_BYTES:
        raise LumarisError("config_invalid", f"{path} does not hold a key of 32 bytes in hex.")
    return KeyPair(seed)


def write_key(path: Path, seed: bytes) -> KeyPair:
    """Save a new key; an existing file is never replaced, a crash leaves no half-written one.

    Raises FileExistsError, or OSError.
    """
    key = KeyPair(seed)
    draft = _write_draft(path, f"{seed.hex()}\n".encode())
    try:
        os.link(draft, path)
    finally:
        draft.unlink()
    return key


def _write_draft(path: Path, data: bytes) -> Path:
    """A new file beside `path`, on disk in whole."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def load_or_create_key(path: Path) -> KeyPair:
    """The key in a file, a new one when there is none. Raises LumarisError as `read_key` does."""
    if not path.exists():
        try:
            return write_key(path, os.urandom(_SEED_BYTES))
        except FileExistsError:
            pass  # another program of this user was quicker
        except OSError as error:
            raise LumarisError("not_writable", f"{path}: {error.strerror}") from None
    return read_key(path)
