"""Offered resources are the least of all bounds; benchmarks are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumaris_node.capability import benchmark
from lumaris_node.capability.benchmark import FILE, REFERENCE, benchmarks, index, measure
from lumaris_node.capability.probe import total_resources


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough slices to have numbers, too few for good ones."""
    monkeypatch.setattr(benchmark, "_SLICES", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_benchmarks_are_measured_once_for_a_share(tmp_path: Path):
    first = benchmarks(tmp_path, 1000)
    assert set(first) == set(REFERENCE)
    assert all(value > 0 for value in first.values())
    kept = json.loads((tmp_path / FILE).read_text())
    kept["values"]["sha256_mb_s"] = 1
    (tmp_path / FILE).write_text(json.dumps(kept))
    assert benchmarks(tmp_path, 1000)["sha256_mb_s"] == 1
    assert benchmarks(tmp_path, 2000)["sha256_mb_s"] > 1
    (tmp_path / FILE).write_text("[]")
    assert benchmarks(tmp_path, 1000)["sha256_mb_s"] > 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_share_of_a_core_is_offered_as_one(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def rate(make: object, threads: int) -> float:
        asked.append(threads)
        return 1e9 * threads

    monkeypatch.setattr(benchmark, "_rate", rate)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert measure(250) == dict.fromkeys(REFERENCE, 250)
    assert set(asked) == {1}
    two = measure(2500)
    assert (two["sha256_mb_s"], two["sha256_all_mb_s"]) == (1000, 2500)
    assert max(asked) == 3


def test_the_index_of_the_reference_is_100():
    assert set(index(dict(REFERENCE)).values()) == {100}
    assert index({"sha256_mb_s": REFERENCE["sha256_mb_s"] * 2, "other": 1}) == {"sha256_mb_s": 200}
