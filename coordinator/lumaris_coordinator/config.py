"""The coordinator's settings: what an operator may choose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal

from lumaris_coordinator.bounds import (
    ADDRESS_RATE,
    BOND_RELEASE_S_MAX,
    CURRENCIES_MAX,
    DISPUTE_S_MAX,
    EVENTS_KEPT_S_DEFAULT,
    EVENTS_KEPT_S_MAX,
    EVENTS_KEPT_S_MIN,
    PROXIES_MAX,
    TLS_NAMES_MAX,
)
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.limits import (
    FEE_BPS_MAX,
    NANOS_MAX,
    SETTLE_WINDOW_S_DEFAULT,
    SETTLE_WINDOW_S_MAX,
    WITNESSES_MAX,
)
from lumaris_protocol.money import NANOS_PER_CREDIT, TEST_CURRENCY

_NETWORK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HOST: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(\.(?!-)[a-z0-9-]{1,63})*")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings. Raises LumarisError `config_invalid` for a value out of its range."""

    state: Path
    # "" keeps the data in a file in `state`; or postgresql://…, which may hold a password.
    database: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = 0  # 0 lets the system choose
    network: str = "devnet"
    currencies: tuple[str, ...] = (TEST_CURRENCY,)  # the first is the main one
    fee_bps: int = 500
    settle_window_s: int = SETTLE_WINDOW_S_DEFAULT
    dispute_evidence_s: int = 72 * 3600  # how long both sides may show evidence
    dispute_check_s: int = 24 * 3600  # how long a drawn checker has
    dispute_window_s: int = 7 * 24 * 3600  # how long a settlement can be disputed
    bond_release_s: int = 7 * 24 * 3600  # how long a bond answers after it was asked back
    user_registration: bool = True  # whether anybody may make a user; operators always may
    address_rate: float = ADDRESS_RATE  # requests a second of one address without credentials
    tls_cert: Path | None = None  # PEM files of the server's certificate chain and key
    tls_key: Path | None = None
    tls_names: tuple[str, ...] = ()  # names of a certificate of our own authority instead of those
    mutual_tls: bool = False  # whether callers need a client certificate of our own authority
    metrics_public: bool = True  # whether anybody who reaches the port may read /metrics
    proxies: tuple[str, ...] = ()  # addresses of reverse proxies whose X-Forwarded-For counts
    test_credit_nanos: int = 1_000 * NANOS_PER_CREDIT  # per account; 0 gives none
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = False  # one line for each request
    webhooks_to_loopback: bool = False  # http(s) to this machine as well: for trying things out
    events_kept_s: int = EVENTS_KEPT_S_DEFAULT  # how long events can be read and replayed
    witnesses: tuple[str, ...] = ()  # peers whose cosignatures of the log always have room
    witnesses_required: int = 0  # how many must answer at a start; none: a new or closed network
    shard_map: Path | None = None  # a JSON file {version, shards}; none: the map of last time
    overlay: bool = False  # be a peer of the overlay, in a process of its own
    overlay_listen: str = "127.0.0.1:0"  # IP:PORT; port 0 is chosen once and kept

    def __post_init__(self) -> None:
        _require(
            "witnesses",
            len(self.witnesses) <= WITNESSES_MAX // 2 and all(map(_is_peer, self.witnesses)),
        )
        _require("witnesses_required", 0 <= self.witnesses_required <= WITNESSES_MAX)
        _require("network", _NETWORK.fullmatch(self.network) is not None)
        _require("port", 0 <= self.port <= 65_535)
        named = all(re.fullmatch(r"[A-Z]{3,8}", name) for name in self.currencies)
        once = len(set(self.currencies)) == len(self.currencies)
        _require("currencies", 0 < len(self.currencies) <= CURRENCIES_MAX and named and once)
        for name in ("dispute_evidence_s", "dispute_check_s", "dispute_window_s"):
            _require(name, 0 < getattr(self, name) <= DISPUTE_S_MAX)
        _require("bond_release_s", 0 <= self.bond_release_s <= BOND_RELEASE_S_MAX)
        _require("log_format", self.log_format in ("text", "json"))
        _require("fee_bps", 0 <= self.fee_bps <= FEE_BPS_MAX)
        _require("settle_window_s", 0 <= self.settle_window_s <= SETTLE_WINDOW_S_MAX)
        _require("events_kept_s", EVENTS_KEPT_S_MIN <= self.events_kept_s <= EVENTS_KEPT_S_MAX)
        _require("address_rate", 0.1 <= self.address_rate <= 1e6)
        _require("tls_key", (self.tls_cert is None) == (self.tls_key is None))
        _require("tls_names", len(self.tls_names) <= TLS_NAMES_MAX)
        _require("tls_names", all(map(_is_host, self.tls_names)))
        _require("tls_names", not self.tls_names or self.tls_cert is None)
        _require("mutual_tls", not self.mutual_tls or self.serves_tls)
        _require("proxies", len(self.proxies) <= PROXIES_MAX and all(map(_is_ip, self.proxies)))
        _require("test_credit_nanos", 0 <= self.test_credit_nanos <= NANOS_MAX)

    @property
    def serves_tls(self) -> bool:
        """Whether the program speaks HTTPS."""
        return self.tls_cert is not None or bool(self.tls_names)

    @property
    def currency(self) -> str:
        """The main currency: of test credit and of bonds that certificates tell of."""
        return self.currencies[0]


def _is_peer(name: str) -> bool:
    try:
        return bool(public_key_of(name))
    except ValueError:
        return False


def _is_ip(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _is_host(name: str) -> bool:
    """Whether it is an IP address or a name of the DNS."""
    try:
        return bool(ip_address(name))
    except ValueError:
        return _HOST.fullmatch(name) is not None and len(name) <= 253


def _require(name: str, holds: bool) -> None:
    if not holds:
        raise LumarisError("config_invalid", f"The setting {name} is out of its range.")
