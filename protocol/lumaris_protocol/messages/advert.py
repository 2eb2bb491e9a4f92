"""What a seller offers, and the certificate that lets it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Address,
    Amount,
    Count,
    Currency,
    Digest,
    Id,
    Message,
    Name,
    Part,
    Peer,
    Seconds,
    SmallDocument,
    Time,
)

Tier = Literal["wasm", "process", "container", "vm"]
# What a runtime offers beside running a command: a feature is advertised only where it works.
Feature = Literal["egress", "exec", "forward", "gpu", "stdin", "warm"]
Features = Annotated[tuple[Feature, ...], Meta(max_length=limits.FEATURES_MAX)]
Verification = Literal["det", "repl", "evid"]


class Gpu(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """GPUs of one model; where they are wanted, no model means any."""

    model: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]
    vram_bytes: Count
    count: Annotated[int, Meta(ge=1, le=limits.GPUS_MAX)]


class Resources(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An amount of capacity. 1,000 CPU millis are one hardware thread."""

    cpu_millis: Count = 0
    memory_bytes: Count = 0
    disk_bytes: Count = 0
    gpus: Annotated[tuple[Gpu, ...], Meta(max_length=limits.GPUS_MAX)] = ()


class Runtime(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An executor tier that answered its probe, and the isolation it was seen to hold.

    `suite` is the version of the attack suite that held in this tier, and `tested_at` when that
    was; both are 0 where it was not run.
    """

    tier: Tier
    version: Name
    assurance: Name
    features: Features = ()
    suite: Count = 0
    tested_at: Time = 0


class PriceTable(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prices in nanos. A lease's rate is the sum over what it reserves; see `pricing`."""

    currency: Currency
    start_nanos: Amount
    cpu_core_s_nanos: Amount
    memory_gib_s_nanos: Amount
    disk_gib_s_nanos: Amount = 0
    gpu_s_nanos: Amount = 0


class MembershipCertificate(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's word that a peer belongs to the market; checked offline with its key."""

    TYPE: ClassVar[str] = "membership"
    SIZE_MAX: ClassVar[int] = limits.ADVERT_BYTES_MAX
    peer: Peer
    account: Id
    roles: Annotated[tuple[Literal["buyer", "seller"], ...], Meta(min_length=1, max_length=2)]
    bond_band: Annotated[int, Meta(ge=0, le=100)]
    serial: Count
    issued_at: Time
    expires_at: Time


class Advert(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a seller offers right now. The highest `seq` counts; `withdrawn` takes it back."""

    TYPE: ClassVar[str] = "advert"
    SIZE_MAX: ClassVar[int] = limits.ADVERT_BYTES_MAX
    seller: Peer
    seq: Count
    issued_at: Time
    expires_at: Time
    region: Name
    total: Resources
    free: Resources
    runtimes: Annotated[tuple[Runtime, ...], Meta(max_length=limits.RUNTIMES_MAX)]
    benchmarks: Annotated[dict[Name, Count], Meta(max_length=limits.BENCHMARKS_MAX)]
    prices: PriceTable
    lease_s_max: Seconds
    cached: Annotated[tuple[Digest, ...], Meta(max_length=limits.CACHED_DIGESTS_MAX)] = ()
    addresses: Annotated[tuple[Address, ...], Meta(max_length=limits.ADDRESSES_MAX)] = ()
    certificate: SmallDocument
    withdrawn: bool = False
