"""What may be offered: the least of machine, cgroup and the owner's share."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from lumaris_protocol.messages.advert import Gpu, Resources

# cgroup v1 writes a number near 2**63 for "no limit".
UNLIMITED_BYTES = 1 << 60


def total_resources(
    state: Path,
    *,
    cpu_millis_share: int | None = None,
    memory_bytes_share: int | None = None,
    disk_bytes_share: int | None = None,
    gpus: tuple[Gpu, ...] = (),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
) -> Resources:
    """What this node may offer. Shares are the owner's upper bounds; None means all there is."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = [(cores or 1) * 1000, _cgroup_cpu_millis(cgroup_root), cpu_millis_share]
    memory = [psutil.virtual_memory().total, _cgroup_memory(cgroup_root), memory_bytes_share]
    disk = [shutil.disk_usage(state).free, disk_bytes_share]
    return Resources(
        cpu_millis=_least(cpu), memory_bytes=_least(memory), disk_bytes=_least(disk), gpus=gpus
    )


def _least(bounds: list[int | None]) -> int:
    return max(0, min(bound for bound in bounds if bound is not None))


def boot_id() -> str:
    """Names this boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return str(int(psutil.boot_time()))


def _own_cgroups() -> dict[str, str]:
    """Controller to path of this process; the empty name is v2's."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                found[controller] = path.lstrip("/")
    return found


def _folders(root: Path, controller: str) -> list[Path]:
    """Where limits of this process may stand: its own group, its parents, the root."""
    own = _own_cgroups()
    bases = [(root / controller, own.get(controller, "")), (root, own.get("", ""))]
    folders: list[Path] = []
    for base, path in bases:
        inner = base / path
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return folders


def _numbers(file: Path) -> list[int]:
    try:
        words = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
    return [int(word) if word.lstrip("-").isdigit() else -1 for word in words]


def _cgroup_memory(root: Path) -> int | None:
    found: list[int | None] = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            found += [n for n in _numbers(folder / name) if 0 < n < UNLIMITED_BYTES]
    return _least(found) if found else None


def _cgroup_cpu_millis(root: Path) -> int | None:
    found: list[int | None] = []
    for folder in _folders(root, "cpu"):
        v2 = _numbers(folder / "cpu.max")
        v1 = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        found.extend(
            quota[0] * 1000 // quota[1]
            for quota in (v2, v1)
            if len(quota) == 2 and quota[0] > 0 and quota[1] > 0
        )
    return _least(found) if found else None
