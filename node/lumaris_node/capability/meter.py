"""Which lease holds which GPUs, and what it used of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from lumaris_node.capability.gpu import Device, GpuSource, Nvml
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Gpu

log = logging.getLogger(__name__)

# The driver's own window of utilisation is a sixth of a second to a second.
SAMPLE_S = 0.5


@dataclass
class GpuUse:
    """What was used since the meter began: busy milliseconds of all GPUs, and their peak memory."""

    gpu_ms: int = 0
    vram_peak_bytes: int = 0


class GpuMeter:
    """Samples the GPUs of one lease. `run` lasts until it is cancelled; `use` is always current."""

    def __init__(
        self,
        uuids: Iterable[str],
        source: GpuSource | None = None,
        *,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._uuids = frozenset(uuids)
        self._source, self._clock = source or Nvml(), clock
        self._then: float | None = None
        self._busy_ms = 0.0
        self.use = GpuUse()

    async def run(self) -> None:
        """Sample twice a second. A driver that stops answering is logged once and asked again."""
        failing = False
        while True:
            try:
                samples = tuple(await trio.to_thread.run_sync(self._source.sample, self._uuids))
                self.take(samples)
                failing = False
            except OSError as error:
                if not failing:
                    log.warning("GPU not read error=%s", error)
                failing = True
            await trio.sleep(SAMPLE_S)

    def take(self, samples: Iterable[Device]) -> None:
        """Count one set of samples; the time since the last one was as busy as they say."""
        now = self._clock()
        found = [device for device in samples if device.uuid in self._uuids]
        elapsed_s = 0.0 if self._then is None else max(0.0, now - self._then)
        self._then = now
        self._busy_ms += sum(elapsed_s * 10 * device.busy_percent for device in found)
        self.use.gpu_ms = int(self._busy_ms)
        used = sum(device.used_bytes for device in found)
        self.use.vram_peak_bytes = max(self.use.vram_peak_bytes, used)


class Gpus:
    """Hands GPUs to leases, each to one at a time. `devices` are this machine's."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices = {device.uuid: device for device in devices}
        self._leases: dict[str, tuple[str, ...]] = {}

    def take(self, lease: str, wanted: tuple[Gpu, ...]) -> tuple[str, ...]:
        """The UUIDs for a lease; the same again for a lease that has some.

        Takes the smallest that fit, by model and memory. Raises LumarisError `no_capacity`.
        """
        if lease in self._leases:
            return self._leases[lease]
        chosen: list[str] = []
        for gpu in sorted(wanted, key=lambda gpu: -gpu.vram_bytes):
            fitting = [
                device
                for device in sorted(self._devices.values(), key=lambda d: (d.vram_bytes, d.uuid))
                if device.uuid not in chosen
                and not self._held(device.uuid)
                and device.vram_bytes >= gpu.vram_bytes
                and gpu.model in ("", device.model)
            ]
            if len(fitting) < gpu.count:
                raise LumarisError("no_capacity", "The GPUs are taken.")
            chosen += [device.uuid for device in fitting[: gpu.count]]
        self._leases[lease] = tuple(chosen)
        return self._leases[lease]

    def give_back(self, lease: str) -> None:
        """The lease is over. Idempotent."""
        self._leases.pop(lease, None)

    def _held(self, uuid: str) -> bool:
        return any(uuid in uuids for uuids in self._leases.values())
