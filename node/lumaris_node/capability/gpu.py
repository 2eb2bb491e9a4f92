"""GPUs through NVML. A machine without the driver or the library has none; that is no error."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Gpu

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """One GPU: what it is, and what it does now. `uuid` is the driver's name, as engines take it.

    `busy_percent` is of the driver's last window, up to a second. In MIG mode there is no such
    number, and it is 0.
    """

    uuid: str
    model: str
    vram_bytes: int
    used_bytes: int = 0
    busy_percent: int = 0


class GpuSource(Protocol):
    """Where GPU facts come from; tests use recorded answers."""

    def devices(self) -> Iterable[Device]:
        """Every GPU; raises OSError when none can be asked."""
        ...

    def sample(self, uuids: Collection[str]) -> Iterable[Device]:
        """These GPUs as they are now; raises OSError as `devices` does. Blocks milliseconds."""
        ...


class Nvml:
    """The NVIDIA driver's own library. `library` is `pynvml` unless a test brings its own."""

    def __init__(self, library: Any = None) -> None:
        self._library = library

    def devices(self) -> Iterable[Device]:
        """Every GPU; raises OSError without driver or library."""
        return self._asked(lambda nvml: [_read(nvml, handle) for handle in _handles(nvml)])

    def sample(self, uuids: Collection[str]) -> Iterable[Device]:
        """These GPUs now; raises OSError, also for a GPU that fell off the bus."""
        return self._asked(
            lambda nvml: [_read(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
        )

    def _asked(self, question: Callable[[Any], T]) -> T:
        nvml = self._library
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise OSError("nvidia-ml-py is not installed") from error
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error
        try:
            return question(nvml)
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error
        finally:
            nvml.nvmlShutdown()


def find_devices(source: GpuSource | None = None) -> tuple[Device, ...]:
    """The GPUs of this machine one by one, none without a driver. Blocks."""
    try:
        return tuple((source or Nvml()).devices())
    except OSError:
        return ()


def count_gpus(devices: Iterable[Device]) -> tuple[Gpu, ...]:
    """Equal GPUs counted together, within the advert's bounds."""
    counted = Counter((device.model, device.vram_bytes) for device in devices)
    return tuple(
        Gpu(
            model=model[: limits.NAME_CHARS_MAX],
            vram_bytes=vram_bytes,
            count=min(count, limits.GPUS_MAX),
        )
        for (model, vram_bytes), count in sorted(counted.items())[: limits.GPUS_MAX]
    )


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]


def _read(nvml: Any, handle: Any) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        busy_percent = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except nvml.NVMLError:  # not supported: MIG, and some older models
        busy_percent = 0
    return Device(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        model=_text(nvml.nvmlDeviceGetName(handle)),
        vram_bytes=int(memory.total),
        used_bytes=int(memory.used),
        busy_percent=busy_percent,
    )


def _text(value: Any) -> str:
    """Older releases of the library answer with bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
