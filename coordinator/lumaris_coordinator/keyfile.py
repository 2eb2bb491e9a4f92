"""The coordinator's signing key on disk."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair

_SEED_BYTES = 32


def prepare_state(state: Path) -> None:
    """Make the state directory, for this user alone. Raises LumarisError `not_writable`."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LumarisError("not_writable", f"{state}: {error.strerror}") from None
    if not os.access(state, os.W_OK | os.X_OK):
        raise LumarisError("not_writable", f"{state} cannot be written by this user.")


def load_or_create(path: Path) -> KeyPair:
    """The key in the file; a new one, mode 0600, when there is none.

    Raises LumarisError: `unsafe_key_file`, `config_invalid` for other content, `not_writable`.
    """
    try:
        _create(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}") from None
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise LumarisError("unsafe_key_file", f"{path} can be read by other users.")
        seed = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}") from None
    except ValueError:
        seed = b""
    if len(seed) != _SEED_BYTES:
        raise LumarisError("config_invalid", f"{path} does not hold a key.")
    return KeyPair(seed)


def _create(path: Path) -> None:
    """Write a new key beside the file and link it in place: a crash leaves no half-written key."""
    if path.exists():
        raise FileExistsError
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_SEED_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        draft.unlink()
