"""Offered resources are the least of all bounds; benchmarks are kept; no driver means no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumaris_node.capability.gpu import Nvml, probe_gpus
from lumaris_node.capability.probe import BENCHMARK_FILE, benchmarks, total_resources


class Recorded:
    def devices(self):
        return [("NVIDIA H100", 80 << 30), ("NVIDIA H100", 80 << 30), ("NVIDIA L4", 24 << 30)]


def test_equal_gpus_are_counted_together():
    assert [(gpu.model, gpu.count) for gpu in probe_gpus(Recorded())] == [
        ("NVIDIA H100", 2),
        ("NVIDIA L4", 1),
    ]


def test_no_driver_is_no_gpu():
    class Missing:
        def devices(self):
            raise OSError("no driver")

    assert probe_gpus(Missing()) == ()
    assert isinstance(probe_gpus(Nvml()), tuple)


def test_shares_and_cgroups_bound_what_is_offered(tmp_path: Path):
    free = total_resources(tmp_path, cgroup_root=tmp_path)
    assert free.cpu_millis >= 1000
    assert free.memory_bytes > 0
    shared = total_resources(
        tmp_path,
        cpu_millis_share=500,
        memory_bytes_share=1 << 20,
        disk_bytes_share=7,
        cgroup_root=tmp_path,
    )
    assert (shared.cpu_millis, shared.memory_bytes, shared.disk_bytes) == (500, 1 << 20, 7)
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "cpu.max").write_text("25000 100000\n")
    bound = total_resources(tmp_path, cgroup_root=tmp_path)
    assert (bound.cpu_millis, bound.memory_bytes) == (250, 1048576)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert total_resources(tmp_path, cgroup_root=tmp_path).cpu_millis == free.cpu_millis


@pytest.mark.slow
def test_benchmarks_are_measured_once(tmp_path: Path):
    first = benchmarks(tmp_path)
    assert first["sha256_mb_s"] > 0
    assert first["wasm_mfuel_s"] > 0
    kept = json.loads((tmp_path / BENCHMARK_FILE).read_text())
    kept["values"]["sha256_mb_s"] = 1
    (tmp_path / BENCHMARK_FILE).write_text(json.dumps(kept))
    assert benchmarks(tmp_path)["sha256_mb_s"] == 1
    (tmp_path / BENCHMARK_FILE).write_text("[]")
    assert benchmarks(tmp_path)["sha256_mb_s"] > 1
