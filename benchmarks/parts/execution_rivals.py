"""The programs that the tiers are compared with, told to do the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.parts.execution_world import LIMITS, World
from lumaris_node.executors.container.config import container_request, seccomp_profile
from lumaris_node.executors.process import order

CPU_PERIOD_US = 100_000
GUEST = 10001


def docker_command(world: World, command: tuple[str, ...]) -> list[str]:
    """`docker run` with the flags of the container tier."""
    spec = world.spec(world.image, command)
    idle = world.root / "bin" / "busybox"
    asked = container_request(spec, idle, node=world.node, runtime="")
    host = asked["HostConfig"]
    profile = world.folder / "seccomp.json"
    profile.write_text(seccomp_profile())
    words = ["docker", "run", "--rm", "--network", "none", "--ipc", host["IpcMode"]]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    words += ["--security-opt", f"seccomp={profile}", "--read-only", "--log-driver", "none"]
    words += ["--user", asked["User"], "--workdir", asked["WorkingDir"], "--no-healthcheck"]
    words += ["--pids-limit", str(host["PidsLimit"]), "--memory", str(host["Memory"])]
    words += ["--memory-swap", str(host["MemorySwap"]), "--cpus", str(host["NanoCpus"] / 1e9)]
    for target, options in host["Tmpfs"].items():
        words += ["--tmpfs", f"{target}:{options}"]
    for item in host["Mounts"]:
        mode = ":ro" if item["ReadOnly"] else ""
        words += ["--volume", f"{item['Source']}:{item['Target']}{mode}"]
    for item in host["Ulimits"]:
        words += ["--ulimit", f"{item['Name']}={item['Soft']}:{item['Hard']}"]
    return [*words, "--entrypoint", command[0], world.image, *command[1:]]


def runc_command(world: World, command: tuple[str, ...]) -> list[str] | None:
    """`runc run` with the limits of the container tier; None without runc."""
    program = shutil.which("runc")
    if program is None or os.geteuid() != 0:
        return None
    bundle = world.folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").unlink(missing_ok=True)
    subprocess.run([program, "spec"], cwd=bundle, check=True)
    file = bundle / "config.json"
    config = json.loads(file.read_text())
    _bound(config, world, command)
    file.write_text(json.dumps(config))
    state = ["--root", str(world.folder / "runc")]
    return [program, *state, "run", "--bundle", str(bundle), f"lumaris-{world.node}"]


def _bound(config: dict[str, Any], world: World, command: tuple[str, ...]) -> None:
    process, linux = config["process"], config["linux"]
    process |= {"terminal": False, "args": list(command), "cwd": "/out", "noNewPrivileges": True}
    process["user"] = {"uid": GUEST, "gid": GUEST}
    process["capabilities"] = {}
    config["root"] = {"path": str(world.root), "readonly": True}
    work = world.folder / "work"
    for name, options in (("in", ["bind", "ro"]), ("out", ["bind", "rw"])):
        mount = {"destination": f"/{name}", "type": "bind", "source": str(work / name)}
        config["mounts"].append(mount | {"options": options})
    memory, quota = LIMITS.memory_bytes, LIMITS.cpu_millis * CPU_PERIOD_US // 1000
    linux["cgroupsPath"] = f"/lumaris-{world.node[:12]}-runc"
    linux["resources"] |= {
        "memory": {"limit": memory, "swap": memory},
        "cpu": {"quota": quota, "period": CPU_PERIOD_US},
        "pids": {"limit": LIMITS.pids},
    }


def bubblewrap_command(world: World, command: tuple[str, ...]) -> list[str]:
    """bubblewrap alone with the options of the process tier. Raises ImportError, OSError."""
    work, scratch = world.folder / "work", world.folder / "scratch"
    scratch.mkdir(exist_ok=True)
    places = {"root": world.root, "in": work / "in", "out": work / "out"}
    places |= {"tmp": scratch, "shm": scratch}
    staged = {f"/tmp/{name}": str(path) for name, path in places.items()}
    options = (staged.get(word, word) for word in order.OPTIONS)
    return [str(order.bubblewrap()), *options, "--", *command]


def bare_command(world: World, command: tuple[str, ...]) -> list[str]:
    """The image's own program without any sandbox."""
    applet = Path(command[0]).name
    return [str(world.root / "bin" / "busybox"), applet, *command[1:]]
