"""What is asked of the engine for one sandbox: every flag that hardens it is in this file."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lumaris_node.executors.port import JobSpec
from lumaris_node.sandbox import users
from lumaris_protocol import limits

GUEST_UID = users.GUEST
LABEL_NODE, LABEL_LEASE = "lumaris.node", "lumaris.lease"
IDLE_AT = "/.lumaris/idle"
# The idle process, and what the runtime itself starts in the group to run a further command.
PIDS_RESERVE = 16
# gVisor's own kernel runs in the group and needs this many tasks; it dies with fewer.
_PIDS_MIN_GVISOR = 1024
_TMP_BYTES_MAX = 64 * limits.MIB
_TMP_FILES_MAX = 4096
_SHM_BYTES = 16 * limits.MIB
_SHM_FILES_MAX = 1024
# When the machine runs out of memory, guests go before what serves them.
_OOM_SCORE = 800
# Rooms that a guest may write to beside /out, emptied after each order.
TEMPORARY = ("/tmp", "/dev/shm")  # noqa: S108 - the guest's own


@cache
def seccomp_profile() -> str:
    """The system calls a guest may make, as the engine reads it."""
    profile = resources.files("lumaris_node.sandbox").joinpath("seccomp.json")
    return json.dumps(json.loads(profile.read_text(encoding="utf-8")))


def container_request(spec: JobSpec, idle: Path, *, node: str, runtime: str) -> dict[str, Any]:
    """The body of the engine's create request. Equal requests make exchangeable sandboxes."""
    return {
        "Image": spec.image,
        "Entrypoint": [IDLE_AT],
        "Cmd": [],
        "User": guest_user(),
        "WorkingDir": "/out",
        # The runtime then makes an empty namespace with loopback by itself; for NetworkMode none
        # alone the engine starts a program of its own, which is half of the time of a start.
        "NetworkDisabled": True,
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": {LABEL_NODE: node, LABEL_LEASE: spec.lease},
        "HostConfig": _host_config(spec, idle, runtime),
    }


def guest_user() -> str:
    """The guest's uid and gid: never root, and ours where we are not root ourselves."""
    root = os.geteuid() == 0
    uid, gid = (GUEST_UID, GUEST_UID) if root else (os.geteuid(), os.getegid())
    return f"{uid}:{gid}"


def _host_config(spec: JobSpec, idle: Path, runtime: str) -> dict[str, Any]:
    bounds = spec.limits
    pids = bounds.pids + PIDS_RESERVE
    if "runsc" in runtime:
        pids = max(pids, _PIDS_MIN_GVISOR)
    host: dict[str, Any] = {
        "Mounts": [
            _bind(spec.inputs, "/in", read_only=True),
            _bind(spec.outputs, "/out", read_only=False),
            _bind(idle, IDLE_AT, read_only=True),
            *(_bind(source, target, read_only=True) for source, target in spec.mounts),
        ],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp_profile()}"],
        "ReadonlyRootfs": True,
        "NetworkMode": "none",
        "IpcMode": "private",
        "PidsLimit": pids,
        "Memory": bounds.memory_bytes,
        "MemorySwap": bounds.memory_bytes,
        "NanoCpus": bounds.cpu_millis * 1_000_000,
        "Init": False,
        "OomScoreAdj": _OOM_SCORE,
        "Tmpfs": {
            TEMPORARY[0]: _tmpfs(min(bounds.disk_bytes, _TMP_BYTES_MAX), _TMP_FILES_MAX),
            TEMPORARY[1]: _tmpfs(_SHM_BYTES, _SHM_FILES_MAX),
        },
        "Ulimits": [
            _ulimit("core", 0),
            _ulimit("nofile", bounds.open_files),
            _ulimit("fsize", min(bounds.disk_bytes, bounds.file_bytes)),
        ],
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "no"},
    }
    if runtime:
        host["Runtime"] = runtime
    if spec.gpus:
        host["DeviceRequests"] = [gpu_request(spec.gpus)]
    return host


def gpu_request(gpus: tuple[str, ...]) -> dict[str, Any]:
    """These GPUs and no others, for computing: no display, no graphics libraries."""
    return {
        "Driver": "nvidia",
        "Count": 0,
        "DeviceIDs": list(gpus),
        "Capabilities": [["gpu", "compute", "utility"]],
        "Options": {},
    }


def _tmpfs(size: int, files: int) -> str:
    return f"size={size},nr_inodes={files},mode=1777,nosuid,nodev,noexec"


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": read_only}


def _ulimit(name: str, value: int) -> dict[str, Any]:
    return {"Name": name, "Soft": value, "Hard": value}
