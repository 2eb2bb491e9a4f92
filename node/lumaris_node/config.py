"""The seller's settings: what is shared, at what price, for whom. `node.toml`, then flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, structs

from lumaris_node.egress import policy
from lumaris_overlay.networks import ip_and_port
from lumaris_overlay.registry import REGISTRIES_DEFAULT
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import EGRESS_RULES_MAX, MIB, OVERLAY_MEMORY_BYTES, PIDS_MAX
from lumaris_protocol.messages.advert import PriceTable, Tier
from lumaris_protocol.money import TEST_CURRENCY, parse_credits

_S_PER_HOUR = 3600

Percent = Annotated[int, Meta(ge=1, le=100)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
# From and until, local time; until midnight is 24:00.
Hours = Annotated[
    str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)\Z")
]
# A registry's host, and its port where that is not the usual one.
Registry = Annotated[str, Meta(max_length=255, pattern=r"^[a-z0-9.-]+(:[0-9]{1,5})?\Z")]


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of this machine is for sale. `cpu_threads` overrides the percentage."""

    cpu_percent: Percent = 50
    memory_percent: Percent = 50
    disk_percent: Percent = 10
    cpu_threads: Annotated[int, Meta(ge=0, le=4096)] = 0
    transfer_mib_s: Annotated[int, Meta(ge=0, le=100_000)] = 0
    pids_max: Annotated[int, Meta(ge=1, le=PIDS_MAX)] = 1024
    encryption: Literal["auto", "fscrypt", "gocryptfs", "tmpfs", "memory", "off"] = "auto"


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prices in credits, as decimal text; written per hour, metered per millisecond."""

    currency: str = TEST_CURRENCY
    start: str = "0.000001"
    cpu_core_hour: str = "0.004"
    memory_gib_hour: str = "0.002"
    disk_gib_hour: str = "0"
    gpu_hour: str = "0.3"

    def table(self) -> PriceTable:
        """The prices as they are advertised. Raises LumarisError `config_invalid`."""
        try:
            return PriceTable(
                currency=self.currency,
                start_nanos=parse_credits(self.start),
                cpu_core_s_nanos=parse_credits(self.cpu_core_hour) // _S_PER_HOUR,
                memory_gib_s_nanos=parse_credits(self.memory_gib_hour) // _S_PER_HOUR,
                disk_gib_s_nanos=parse_credits(self.disk_gib_hour) // _S_PER_HOUR,
                gpu_s_nanos=parse_credits(self.gpu_hour) // _S_PER_HOUR,
            )
        except ValueError as error:
            raise LumarisError("config_invalid", f"[price] {error}") from None


class Accept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which work is taken."""

    runtimes: tuple[Tier, ...] = ("wasm", "process", "container")
    lease_s_max: Annotated[int, Meta(ge=60, le=24 * _S_PER_HOUR)] = 4 * _S_PER_HOUR
    egress: Annotated[tuple[str, ...], Meta(max_length=4 * EGRESS_RULES_MAX)] = ()
    buyer_images: bool = True
    registries: Annotated[tuple[Registry, ...], Meta(max_length=64)] = REGISTRIES_DEFAULT
    gpu: bool = True


class Vm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the `vm` tier boots; it is offered only where KVM works."""

    kernel: str = ""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When new work is taken, in this machine's local time. No hours mean all day."""

    days: tuple[Day, ...] = DAYS
    hours: Annotated[tuple[Hours, ...], Meta(max_length=16)] = ()


class Settle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is done about money. With `dispute_unpaid` a session that ended with delivered and
    unpaid work is disputed before it is claimed; that takes a bond from the node's account."""

    dispute_unpaid: bool = False


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How other peers find and reach this node, and what it does for them."""

    announce: tuple[str, ...] = ()
    relay_service: bool = False
    mdns: bool = False


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of a node."""

    coordinator: str = "http://127.0.0.1:24480"
    coordinator_ca: str = ""  # file of the authority of a coordinator that has its own
    listen: str = "127.0.0.1:0"
    direct: str = ""
    region: str = "local"
    bootstrap: tuple[str, ...] = ()
    overlay_memory_mib: Annotated[int, Meta(ge=192, le=65_536)] = OVERLAY_MEMORY_BYTES // MIB
    modules: str = ""  # compiled modules and self-test reports, for several nodes of one owner
    share: Share = Share()
    price: Price = Price()
    accept: Accept = Accept()
    vm: Vm = Vm()
    schedule: Schedule = Schedule()
    settle: Settle = Settle()
    network: Network = Network()
    log_level: Literal["debug", "info", "warning"] = "info"


def direct_address(config: NodeConfig) -> tuple[str, int] | None:
    """Where other programs may connect directly; None when they may not.

    Raises LumarisError `config_invalid`.
    """
    if config.direct == "off":
        return None
    if config.direct:
        return ip_and_port("direct", config.direct)
    return ip_and_port("listen", config.listen)[0], 0


def load(state: Path, **flags: object) -> NodeConfig:
    """`node.toml` of the state directory, with flags that were given on top.

    Raises LumarisError `config_invalid` naming the setting.
    """
    path = state / "node.toml"
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=NodeConfig)
    except FileNotFoundError:
        config = NodeConfig()
    except (msgspec.MsgspecError, OSError, ValueError) as error:
        raise LumarisError("config_invalid", f"{path}: {error}") from None
    given = {name: value for name, value in flags.items() if value is not None}
    config = structs.replace(config, **given)
    config.price.table()
    try:
        direct_address(config)
        ip_and_port("listen", config.listen)
        policy.check_patterns(config.accept.egress)
        for address in config.bootstrap:
            if not address.startswith("/") or "/p2p/" not in address:
                raise LumarisError("config_invalid", f"bootstrap {address!r} has no /p2p/PEER.")
    except LumarisError as error:
        raise LumarisError(error.code, f"{path}: {error.message}") from None
    return config
