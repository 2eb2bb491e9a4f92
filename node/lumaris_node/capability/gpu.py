"""GPUs through NVML. A machine without the driver or the library has none; that is no error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Gpu


class GpuSource(Protocol):
    """Where GPU facts come from; tests use recorded answers."""

    def devices(self) -> Iterable[tuple[str, int]]:
        """Model and memory in bytes of each GPU; raises OSError when none can be asked."""
        ...


class Nvml:
    """The NVIDIA driver's own library."""

    def devices(self) -> Iterable[tuple[str, int]]:
        """Model and memory in bytes of each GPU; raises OSError without driver or library."""
        try:
            import pynvml
        except ImportError as error:
            raise OSError("nvidia-ml-py is not installed") from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error
        try:
            found = []
            for index in range(pynvml.nvmlDeviceGetCount()):
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = pynvml.nvmlDeviceGetName(device)
                model = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
                found.append((model, int(pynvml.nvmlDeviceGetMemoryInfo(device).total)))
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error
        else:
            return found
        finally:
            pynvml.nvmlShutdown()


def probe_gpus(source: GpuSource | None = None) -> tuple[Gpu, ...]:
    """The GPUs of this machine, equal ones counted together, within the advert's bounds."""
    try:
        devices = Counter((source or Nvml()).devices())
    except OSError:
        return ()
    return tuple(
        Gpu(
            model=model[: limits.NAME_CHARS_MAX],
            vram_bytes=vram_bytes,
            count=min(count, limits.GPUS_MAX),
        )
        for (model, vram_bytes), count in sorted(devices.items())[: limits.GPUS_MAX]
    )
