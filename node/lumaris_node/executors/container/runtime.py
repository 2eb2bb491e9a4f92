"""Which of the engine's runtimes a guest is run under: the strongest that really runs something."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumaris_node.executors.container.engine import Engine
from lumaris_protocol.errors import LumarisError

# The image of a trial holds nothing: what runs in it is mounted. It is not under an offered name.
_TRIAL_TAG = ("lumaris-trial", "1")


@dataclass(frozen=True)
class Isolation:
    """A runtime of the engine, and what it is worth. `native`: guests run on this kernel."""

    runtime: str  # "" is the engine's default
    assurance: str
    native: bool


def candidates(info: dict[str, Any], wanted: str) -> list[Isolation]:
    """What the engine's `info` offers, the strongest first; only `wanted` when it is given."""
    found: list[Isolation] = []
    default = str(info.get("DefaultRuntime") or "")
    for name in sorted(info.get("Runtimes") or {}):
        if "kata" in name:
            found.append(Isolation(name, "kata", native=False))
        elif "runsc" in name or "gvisor" in name:
            found.append(Isolation(name, "gvisor", native=False))
    found.sort(key=lambda item: item.assurance, reverse=True)  # kata before gvisor
    options = str(info.get("SecurityOptions", ""))
    if "seccomp" in options:  # else our profile could not be applied
        userns = "name=userns" in options or "name=rootless" in options
        assurance = "container+userns" if userns else "container"
        if not any(item.runtime == default for item in found):
            found.append(Isolation("", assurance, native=True))
        if wanted not in ("", default) and wanted in (info.get("Runtimes") or {}):
            found.append(Isolation(wanted, assurance, native=True))
    if not wanted:
        return found
    named = [item for item in found if item.runtime == wanted]
    return named[:1] or [item for item in found if item.runtime == "" and wanted == default]


async def trial_image(engine: Engine) -> str:
    """The id of an image that holds nothing. Raises LumarisError `platform_error`."""
    name = ":".join(_TRIAL_TAG)
    try:
        found: dict[str, Any] = await engine.call("inspect_image", name)
    except LumarisError:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as tar:
            folder = tarfile.TarInfo("out")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        repository, tag = _TRIAL_TAG
        await engine.call("import_image_from_data", raw.getvalue(), repository=repository, tag=tag)
        found = await engine.call("inspect_image", name)
    return str(found["Id"])


def gpus_possible(info: dict[str, Any]) -> bool:
    """Whether the engine can hand NVIDIA devices to a container."""
    hook = shutil.which("nvidia-container-runtime-hook") or "nvidia" in (info.get("Runtimes") or {})
    return bool(hook and Path("/dev/nvidiactl").exists())
