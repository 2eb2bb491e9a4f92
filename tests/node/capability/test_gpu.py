"""GPUs by recorded NVML answers: who they are, who has them, what was used."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from lumaris_node.capability.gpu import Device, Nvml, count_gpus, find_devices
from lumaris_node.capability.meter import SAMPLE_S, GpuMeter, Gpus
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import GIB
from lumaris_protocol.messages.advert import Gpu

A, B, C = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abc")
H100, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA L4"
DEVICES = (
    Device(A, H100, 80 * GIB),
    Device(B, H100, 80 * GIB),
    Device(C, L4, 24 * GIB),
)


class Recorded:
    """Answers in turn; the last one again and again. An OSError is raised."""

    def __init__(self, *answers: Iterable[Device] | OSError) -> None:
        self.answers = list(answers)

    def devices(self) -> Iterable[Device]:
        return self.sample(())

    def sample(self, uuids: Collection[str]) -> Iterable[Device]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


class NVMLError(Exception):
    pass


class Library:
    """What `pynvml` answered on a machine with two GPUs, the second in MIG mode."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.open = 0
        self.names: list[object] = [H100.encode(), L4]

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid not in (A, C):
            raise NVMLError("Not Found")
        return (A, C).index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> object:  # noqa: N802
        return (A, C)[handle]

    def nvmlDeviceGetName(self, handle: int) -> object:  # noqa: N802
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=(80, 24)[handle] * GIB, used=(3, 1)[handle] * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=37, memory=5)


def test_the_driver_is_asked_and_closed():
    library = Library()
    nvml = Nvml(library)
    assert list(nvml.devices()) == [
        Device(A, H100, 80 * GIB, 3 * GIB, 37),
        Device(C, L4, 24 * GIB, 1 * GIB, 0),
    ]
    assert [device.uuid for device in nvml.sample([C])] == [C]
    with pytest.raises(OSError, match="Not Found"):
        nvml.sample([B])
    assert library.open == 0


def test_equal_gpus_are_counted_together():
    found = count_gpus(find_devices(Recorded(DEVICES)))
    assert [(gpu.model, gpu.count) for gpu in found] == [(H100, 2), (L4, 1)]


def test_no_driver_is_no_gpu():
    missing = Recorded(OSError("no driver"))
    assert find_devices(missing) == ()
    assert count_gpus(()) == ()
    assert isinstance(find_devices(Nvml()), tuple)


def wanted(model: str = "", gib: int = 0, count: int = 1) -> tuple[Gpu, ...]:
    return (Gpu(model=model, vram_bytes=gib * GIB, count=count),)


def test_a_gpu_is_one_lease_s_at_a_time():
    gpus = Gpus(DEVICES)
    assert gpus.take("one", wanted(H100)) == (A,)
    assert gpus.take("one", wanted(H100)) == (A,), "asked again, the same"
    assert gpus.take("two", wanted(H100)) == (B,)
    with pytest.raises(LumarisError) as caught:
        gpus.take("three", wanted(H100))
    assert caught.value.code == "no_capacity"
    gpus.give_back("one")
    gpus.give_back("one")
    assert gpus.take("three", wanted(H100)) == (A,)


def test_the_smallest_that_fits_is_taken():
    gpus = Gpus(DEVICES)
    assert gpus.take("small", wanted(gib=16)) == (C,)
    assert gpus.take("next", wanted(gib=16)) == (A,)


def test_all_or_nothing():
    gpus = Gpus(DEVICES)
    with pytest.raises(LumarisError):
        gpus.take("many", wanted(H100, count=3))
    both = gpus.take("both", (*wanted(gib=16), *wanted(H100, gib=80, count=2)))
    assert set(both) == {A, B, C}
    assert Gpus(()).take("none", ()) == ()


def test_busy_time_and_peak_memory_are_of_the_lease_s_gpus_only():
    now = [0.0]
    meter = GpuMeter((A, B), Recorded(()), clock=lambda: now[0])
    meter.take([Device(A, H100, 80 * GIB, 1 * GIB, 100), Device(C, L4, 24 * GIB, 9 * GIB, 100)])
    assert (meter.use.gpu_ms, meter.use.vram_peak_bytes) == (0, GIB)
    now[0] = 2.0
    meter.take([Device(A, H100, 80 * GIB, 2 * GIB, 50), Device(B, H100, 80 * GIB, 3 * GIB, 100)])
    assert (meter.use.gpu_ms, meter.use.vram_peak_bytes) == (3000, 5 * GIB)
    now[0] = 3.0
    meter.take([Device(A, H100, 80 * GIB, 0, 0)])
    assert (meter.use.gpu_ms, meter.use.vram_peak_bytes) == (3000, 5 * GIB)


async def test_a_driver_that_stops_answering_stops_no_meter(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    mock_clock.autojump_threshold = 0.01
    busy = [Device(A, H100, 80 * GIB, GIB, 100)]
    meter = GpuMeter((A,), Recorded(busy, OSError("lost"), OSError("lost"), busy))
    with trio.move_on_after(SAMPLE_S * 4.5):
        await meter.run()
    assert meter.use.gpu_ms >= 1500
    assert caplog.text.count("GPU not read") == 1
