"""How much of this machine is for sale: the owner's share of what it really has."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from lumaris_node.capability import probe
from lumaris_node.config import Share
from lumaris_protocol.messages.advert import Gpu, Resources

# Of the memory for sale where a job's disk takes memory: a quarter suits jobs with small files.
_DISK_PART = 4


def for_sale(
    state: Path, share: Share, *, gpus: tuple[Gpu, ...] = (), memory_backed: bool = False
) -> Resources:
    """The share of processors, memory and disk, and every GPU. Blocks.

    With `memory_backed` workspaces, disk is a part of the memory that is for sale.
    """
    whole = probe.total_resources(state, gpus=gpus)
    cpu_millis = whole.cpu_millis * share.cpu_percent // 100
    memory_bytes = whole.memory_bytes * share.memory_percent // 100
    disk_bytes = whole.disk_bytes * share.disk_percent // 100
    if memory_backed:
        disk_bytes = min(disk_bytes, memory_bytes // _DISK_PART)
        memory_bytes -= disk_bytes
    return structs.replace(
        whole,
        cpu_millis=min(share.cpu_threads * 1000 or cpu_millis, whole.cpu_millis),
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
    )
