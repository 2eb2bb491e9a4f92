"""Control groups: version 1 as this machine has it, version 2 against a recorded tree."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris_node.sandbox import cgroups
from lumaris_node.sandbox.cgroups import Cgroups, CgroupsUnavailableError, Facts, Group, GroupV2

MIB = 1024 * 1024
NAME = f"lumaris-test-{os.getpid()}"
SLEEPERS = "for n in 1 2 3; do (trap '' TERM; sleep 600 & wait) & done; echo on; wait"
LIMITS = {"memory_bytes": 64 * MIB, "cpu_millis": 1000, "pids": 32}
UNIFIED = next(
    (path for path in (cgroups.ROOT / "unified", cgroups.ROOT) if (path / "cgroup.procs").exists()),
    cgroups.ROOT,
)


@pytest.fixture
def real(native_sandbox: None) -> Cgroups:
    return Cgroups()


@contextlib.contextmanager
def member(group: Group, command: str) -> Iterator[subprocess.Popen[bytes]]:
    def enter() -> None:
        for path in group.joins:
            path.write_text("0")

    shell = ["/bin/sh", "-c", command]
    with subprocess.Popen(shell, preexec_fn=enter, stdout=subprocess.PIPE) as process:  # noqa: PLW1509 - no thread runs here
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.slow
def test_limits_are_the_kernels_and_so_are_the_facts(real: Cgroups):
    group = real.create(NAME, memory_bytes=32 * MIB, cpu_millis=500, pids=8)
    try:
        assert group.facts().oom_kills == group.facts().pids_refused == 0
        with member(group, "dd if=/dev/zero of=/dev/null bs=200M count=1; exit 5") as process:
            process.wait(20)
        with member(group, "for n in 1 2 3 4 5 6 7 8 9 10; do sleep 600 & done; wait") as process:
            while not group.facts().pids_refused and process.poll() is None:
                pass
            assert group.kill()
        facts = group.facts()
        assert facts.oom_kills >= 1
        assert facts.pids_refused >= 1
        assert facts.cpu_ms > 0
        assert 16 * MIB <= facts.memory_peak_bytes <= 32 * MIB
    finally:
        assert group.remove()
    assert group.facts() == Facts()
    assert group.remove()


@pytest.mark.slow
def test_the_frozen_are_killed_too_and_reaped_by_prefix(real: Cgroups):
    with contextlib.ExitStack() as stack:
        members = []
        for name in (f"{NAME}-a", f"{NAME}-b"):
            members.append(stack.enter_context(member(real.create(name, **LIMITS), SLEEPERS)))
            assert members[-1].stdout is not None
            assert members[-1].stdout.readline() == b"on\n"
        with pytest.raises(FileExistsError):
            real.create(f"{NAME}-a", **LIMITS)
        real.group(f"{NAME}-b").freeze()
        assert real.reap(f"{NAME}-") == 2
        assert [process.wait(5) for process in members] == [-9, -9]
    assert real.names(NAME) == ()


@pytest.mark.slow
def test_one_member_is_spared_and_keeps_its_limits(real: Cgroups):
    bounds = LIMITS | {"cpu_millis": 50}
    spin = "for n in 1 2 3 4 5 6; do (while :; do :; done) & done; echo on; wait; wait"
    group = real.create(NAME, **bounds)
    try:
        with member(group, "exec sleep 600") as spared, member(group, spin) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            path, _ = group.quota_file()
            quota = path.read_text()
            assert group.kill(spare=spared.pid)
            assert process.wait(5) == -9
            assert group.pids() == (spared.pid,)
            assert path.read_text() == quota
    finally:
        assert group.remove()


@pytest.mark.slow
def test_version_1_bounds_the_buffers_of_sockets(real: Cgroups):
    group = real.create(NAME, **LIMITS)
    try:
        found = group.folders[0] / "memory.kmem.tcp.limit_in_bytes"
        assert real.version == 2 or int(found.read_text()) == LIMITS["memory_bytes"]
    finally:
        assert group.remove()


@pytest.mark.slow
def test_the_unified_hierarchy_kills_and_freezes(native_sandbox: None):
    folder = UNIFIED / f"{NAME}-v2"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs a unified hierarchy: {error.strerror}")
    group = GroupV2(folder.name, (folder,))
    try:
        with member(group, SLEEPERS) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            assert len(group.pids()) >= 4
            group.freeze()
            assert group.kill()
            assert process.wait(5) == -9
    finally:
        assert group.remove()


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a unified hierarchy of Linux 6.1, where writes are recorded."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    (tmp_path / "cgroup.procs").write_text("1\n2\n")
    monkeypatch.setattr(cgroups, "_write", lambda path, text: path.write_text(text))
    monkeypatch.setattr(cgroups, "TRIES", 2)
    return tmp_path


def test_version_2_limits_and_facts(unified: Path):
    found = Cgroups(unified)
    assert found.version == 2
    assert (unified / "cgroup.subtree_control").read_text() == "+cpu"
    (unified / "a").mkdir()
    (unified / "a" / "memory.swap.max").write_text("max")
    group = found.create("a", memory_bytes=64 * MIB, cpu_millis=1500, pids=34)
    written = {path.name: path.read_text() for path in (unified / "a").iterdir()}
    assert written == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
        "pids.max": "34",
    }
    recorded = {
        "cpu.stat": "usage_usec 1508000\nuser_usec 1\nsystem_usec 2\nnr_periods 3\n",
        "memory.current": "4096\n",
        "memory.events": "low 0\nhigh 0\nmax 31\noom 1\noom_kill 3\noom_group_kill 1\n",
        "pids.events": "max 7\n",
    }
    for name, text in recorded.items():
        (unified / "a" / name).write_text(text)
    assert group.facts() == Facts(1508, 4096, 3, 7)
    (unified / "a" / "memory.peak").write_text("9000\n")
    assert group.facts().memory_peak_bytes == 9000
    group.freeze()
    assert (unified / "a" / "cgroup.freeze").read_text() == "1"
    group.thaw()
    assert (unified / "a" / "cgroup.freeze").read_text() == "0"
    (unified / "a" / "cgroup.procs").write_text("4194303\n")
    (unified / "a" / "cgroup.kill").write_text("")
    assert not group.kill()
    assert (unified / "a" / "cgroup.kill").read_text() == "1"
    (unified / "a" / "cgroup.procs").write_text("")
    assert group.kill()


def test_groups_are_found_by_prefix_only(unified: Path):
    for name in ("lumaris-n-a", "lumaris-m-a", "system.slice", "lumaris-n-b c"):
        (unified / name).mkdir()
    found = Cgroups(unified)
    assert found.names("lumaris-n-") == ("lumaris-n-a",)
    assert found.reap("lumaris-n-") == 1
    assert sorted(path.name for path in unified.iterdir() if path.is_dir()) == [
        *("lumaris-m-a", "lumaris-n-b c", "system.slice")
    ]


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "a" * 101, "a\n"])
def test_names_are_ours(unified: Path, name: str):
    with pytest.raises(ValueError, match="not a group's name"):
        Cgroups(unified).group(name)


def test_why_there_are_none(unified: Path, monkeypatch: pytest.MonkeyPatch):
    assert cgroups.unavailable(unified) == ""
    assert "lacks memory, pids" in cgroups.unavailable(unified / "none")

    def busy(path: Path, text: str) -> None:
        raise OSError(16, "Device or resource busy")

    (unified / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroups, "_write", busy)
    assert "does not delegate: Device or resource busy" in cgroups.unavailable(unified)
    (unified / "cgroup.controllers").write_text("cpuset cpu\n")
    with pytest.raises(CgroupsUnavailableError, match="lacks memory, pids"):
        Cgroups(unified)


def test_a_group_that_cannot_be_limited_is_not_left(unified: Path, monkeypatch: pytest.MonkeyPatch):
    found = Cgroups(unified)

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(cgroups, "_write", refuse)
    with pytest.raises(PermissionError):
        found.create("a", **LIMITS)
    assert not (unified / "a").exists()
