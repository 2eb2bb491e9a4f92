"""Where a buyer's things are: the coordinator, the key, the store, the overlay."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.errors import LumarisError

DEFAULT_COORDINATOR = "http://127.0.0.1:24480"
_PREFIX = "LUMARIS_"


@dataclass(frozen=True)
class Profile:
    """A buyer's settings. Flags win over the environment, which wins over the defaults."""

    state: Path
    coordinator: str
    bootstrap: tuple[str, ...] = ()
    overlay_linger_s: int = 180

    @property
    def key_file(self) -> Path:
        """The identity key."""
        return self.state / "buyer.key"

    @property
    def database(self) -> Path:
        """Sessions, jobs and receipts."""
        return self.state / "buyer.db"

    @property
    def jobs(self) -> Path:
        """Logs and artifacts, a folder for each job."""
        return self.state / "jobs"

    @property
    def overlay(self) -> Path:
        """The folder of this buyer's overlay process: its socket, log and remembered peers."""
        return self.state / "overlay"


def load(
    *,
    state: str | Path | None = None,
    coordinator: str | None = None,
    overlay_linger_s: int | None = None,
) -> Profile:
    """The profile from arguments, then `LUMARIS_STATE`, `LUMARIS_COORDINATOR_URL`, then defaults.

    Raises LumarisError `not_writable` when the state directory cannot be made.
    """
    folder = Path(state or os.environ.get(f"{_PREFIX}STATE") or default_state())
    url = coordinator or os.environ.get(f"{_PREFIX}COORDINATOR_URL") or DEFAULT_COORDINATOR
    linger = os.environ.get(f"{_PREFIX}OVERLAY_LINGER_S", "180")
    if overlay_linger_s is None:
        if not linger.isdigit():
            raise LumarisError("config_invalid", f"{_PREFIX}OVERLAY_LINGER_S is not a number.")
        overlay_linger_s = int(linger)
    make_private_folder(folder)
    return Profile(folder, url.rstrip("/"), overlay_linger_s=overlay_linger_s)


def default_state() -> Path:
    """The user's data directory for Lumaris."""
    import platformdirs

    return Path(platformdirs.user_data_dir("lumaris")) / "buyer"
