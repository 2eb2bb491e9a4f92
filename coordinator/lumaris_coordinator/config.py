"""The coordinator's settings: what an operator may choose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import (
    FEE_BPS_MAX,
    NANOS_MAX,
    SETTLE_WINDOW_S_DEFAULT,
    SETTLE_WINDOW_S_MAX,
)
from lumaris_protocol.money import NANOS_PER_CREDIT, TEST_CURRENCY

_NETWORK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings. Raises LumarisError `config_invalid` for a value out of its range."""

    state: Path
    host: str = "127.0.0.1"
    port: int = 0  # 0 lets the system choose
    network: str = "devnet"
    currency: str = TEST_CURRENCY
    fee_bps: int = 500
    settle_window_s: int = SETTLE_WINDOW_S_DEFAULT
    test_credit_nanos: int = 1_000 * NANOS_PER_CREDIT  # per account; 0 gives none
    shard_map: Path | None = None  # a JSON file {version, shards}; none: the map of last time

    def __post_init__(self) -> None:
        _require("network", _NETWORK.fullmatch(self.network) is not None)
        _require("port", 0 <= self.port <= 65_535)
        _require("currency", re.fullmatch(r"[A-Z]{3,8}", self.currency) is not None)
        _require("fee_bps", 0 <= self.fee_bps <= FEE_BPS_MAX)
        _require("settle_window_s", 0 <= self.settle_window_s <= SETTLE_WINDOW_S_MAX)
        _require("test_credit_nanos", 0 <= self.test_credit_nanos <= NANOS_MAX)


def _require(name: str, holds: bool) -> None:
    if not holds:
        raise LumarisError("config_invalid", f"The setting {name} is out of its range.")
