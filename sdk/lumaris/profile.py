"""Where a buyer's things are: the coordinator, the key, the store, the overlay."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lumaris_overlay.networks import ip_and_port
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import MIB

DEFAULT_COORDINATOR = "http://127.0.0.1:24480"
_PREFIX = "LUMARIS_"


@dataclass(frozen=True)
class Profile:
    """A buyer's settings. Flags win over the environment, which wins over the defaults."""

    state: Path
    coordinator: str
    bootstrap: tuple[str, ...] = ()
    overlay_linger_s: int = 180
    overlay_listen: str = ""
    transfer_mib_s: int = 0
    ca_file: Path | None = None  # the authority of a coordinator that has its own

    @property
    def listen(self) -> str:
        """Where the overlay process listens, as IP:PORT.

        A buyer needs no open port, but only a listening one can be met half-way by a seller
        behind a NAT. In a market on this machine nobody outside has a reason to come.
        """
        if self.overlay_listen:
            return self.overlay_listen
        return "127.0.0.1:0" if _is_loopback(self.coordinator) else "0.0.0.0:0"

    @property
    def transfer_bytes_per_s(self) -> int | None:
        """The most that files of one transfer may take; None for no cap."""
        return self.transfer_mib_s * MIB or None

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
    """The profile from arguments, then `LUMARIS_STATE` and its like, then defaults.

    Raises LumarisError `not_writable` when the state directory cannot be made, `config_invalid`
    for a variable that is no number.
    """
    folder = Path(state or os.environ.get(f"{_PREFIX}STATE") or default_state())
    url = coordinator or os.environ.get(f"{_PREFIX}COORDINATOR_URL") or DEFAULT_COORDINATOR
    if overlay_linger_s is None:
        overlay_linger_s = _number(f"{_PREFIX}OVERLAY_LINGER_S", 180)
    make_private_folder(folder)
    return Profile(
        folder,
        url.rstrip("/"),
        overlay_linger_s=overlay_linger_s,
        overlay_listen=_address(f"{_PREFIX}OVERLAY_LISTEN"),
        transfer_mib_s=_number(f"{_PREFIX}TRANSFER_MIB_S", 0),
        ca_file=Path(authority) if (authority := os.environ.get(f"{_PREFIX}CA_FILE")) else None,
    )


def default_state() -> Path:
    """The user's data directory for Lumaris."""
    import platformdirs

    return Path(platformdirs.user_data_dir("lumaris")) / "buyer"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise LumarisError("config_invalid", f"{name} is not a number.")
    return int(text)


def _address(name: str) -> str:
    text = os.environ.get(name, "")
    if text:
        ip_and_port(name, text)
    return text


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
