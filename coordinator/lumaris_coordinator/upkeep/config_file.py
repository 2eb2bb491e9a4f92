"""`coordinator.toml`: every setting, written once with its default and its meaning."""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from lumaris_coordinator.bounds import CONFIG_BYTES_MAX
from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity.keys import network_of, require_network
from lumaris_coordinator.upkeep.folder import require_private
from lumaris_overlay.private_files import make_private_folder, write_private_file
from lumaris_protocol.errors import LumarisError

NAME: Final = "coordinator.toml"
MEANINGS: Final = {
    "database": "postgresql://… for several replicas; empty keeps the data in this folder. The\n"
    "# environment's LUMARIS_COORDINATOR_DATABASE wins, and keeps a password out of this file.",
    "host": "Address to listen on.",
    "port": "Port to listen on.",
    "network": "Name of the network; documents of another one are refused. Never changed later.",
    "currencies": "Currencies of the ledger; the first is the main one.",
    "fee_bps": "The fee of a settlement in hundredths of a per cent.",
    "settle_window_s": "Seconds after a session's end in which a party may claim.",
    "bond_release_s": "Seconds that a bond answers for after its peer asked it back.",
    "tls_cert": "PEM file of the certificate chain: serve HTTPS.",
    "tls_key": "PEM file of the certificate's private key.",
    "tls_names": "Names and IP addresses for which this coordinator's own authority makes the\n"
    "# certificate, instead of tls_cert: serve HTTPS to whoever has tls/ca.pem of this folder.",
    "mutual_tls": "Whether callers need a client certificate of this coordinator's own authority.",
    "dispute_window_s": "Seconds in which a settlement can be disputed.",
    "dispute_evidence_s": "Seconds in which the parties of a dispute may show evidence.",
    "dispute_check_s": "Seconds that a checker has to run an order again.",
    "user_registration": "Whether anybody may make a user.",
    "address_rate": "Requests a second of one address that shows no credentials.",
    "proxies": "Addresses of reverse proxies whose X-Forwarded-For counts.",
    "test_credit_nanos": "Test credit that an account may get, in nanos; 0 gives none.",
    "webhooks_to_loopback": "Whether webhooks may go to this machine: for trying things out.",
    "metrics_public": "Whether anybody may read /metrics; else this machine and operators' keys.",
    "events_kept_s": "Seconds that events can be read, resumed from and replayed to webhooks.",
    "witnesses": "Peers whose cosignatures of the receipts log always have room.",
    "witnesses_required": "How many of them must answer at a start.",
    "shard_map": "JSON file {version, shards} that divides the market.",
    "log_format": "How log lines look: text or json.",
    "log_requests": "Whether every request gets a line in the log.",
    "overlay": "Whether to be a peer of the overlay.",
    "overlay_listen": "IP:PORT of the overlay's peer.",
}
# What a folder made by `init` serves on when nobody says otherwise.
_PORT: Final = 24_480


def names() -> list[str]:
    """The settings that the file may hold: all but the folder it lies in."""
    return [field.name for field in fields(Settings) if field.name != "state"]


def template(chosen: dict[str, Any]) -> str:
    """The text of a new file: what was chosen in force, everything else a comment."""
    lines = ["# Settings of the coordinator. A line without # is in force; flags win over it."]
    for field in fields(Settings):
        if field.name == "state":
            continue
        default = field.default if field.default is not MISSING else ""
        value = chosen.get(field.name, _PORT if field.name == "port" else default)
        mark = "" if field.name in chosen else "# "
        lines += ["", f"# {MEANINGS.get(field.name, '')}", f"{mark}{field.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def initialise(state: Path, chosen: dict[str, Any]) -> Path:
    """Make the folder and its configuration; the file.

    Raises LumarisError: `not_writable` when there is one already, `unsafe_key_file` for a folder
    that others can enter, `usage` for a password, `config_invalid`.
    """
    Settings(state=state, **_converted(chosen))
    _require_no_password(chosen.get("database", ""))
    require_private(state)
    make_private_folder(state)
    path = state / NAME
    if path.exists():
        raise LumarisError(
            "not_writable", f"{path} exists already.", hint="Edit it, or choose another folder."
        )
    write_private_file(path, template(chosen).encode())
    return path


def _require_no_password(address: str) -> None:
    """What stands on a command line can be read by everybody on the machine."""
    parts = urlsplit(address)
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise LumarisError(
            "usage",
            "The address of the database holds a password.",
            hint="Name a file of mode 0600 instead: …?passfile=/var/lib/lumaris/pgpass",
        )


def read(state: Path) -> dict[str, Any]:
    """What a folder keeps: its network since the first start, and the settings of its file.

    Raises LumarisError `config_invalid` for a file that cannot be read, names what there is not, or
    is of another network than the folder's keys.
    """
    found, known = _in_file(state), network_of(state)
    if not known:
        return found
    require_network(state, found.setdefault("network", known))
    return found


def _in_file(state: Path) -> dict[str, Any]:
    path = state / NAME
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}.") from None
    try:
        if len(text) > CONFIG_BYTES_MAX:
            raise ValueError(f"it is longer than {CONFIG_BYTES_MAX} bytes")
        found = tomllib.loads(text.decode())
    except ValueError as error:  # a TOML or Unicode error is one
        raise LumarisError("config_invalid", f"{path}: {error}.") from None
    unknown = sorted(set(found) - set(names()))
    if unknown:
        raise LumarisError("config_invalid", f"{path}: there is no setting {unknown[0][:40]}.")
    return _converted(found)


def _converted(found: dict[str, Any]) -> dict[str, Any]:
    """TOML's types as those of the settings. Raises LumarisError `config_invalid`."""
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: Any) -> Any:
    default = next(field.default for field in fields(Settings) if field.name == name)
    if default is None:  # the files that there may be
        return Path(value) if value else None
    wanted = type(default)
    if wanted is tuple and isinstance(value, list):
        return tuple(map(str, value))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise LumarisError(
            "config_invalid", f"The setting {name} is not of type {wanted.__name__}."
        )
    return value


def _toml(value: Any) -> str:
    """JSON's texts, numbers, truth values and lists of texts are TOML's."""
    if value is None:
        return '""'
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
