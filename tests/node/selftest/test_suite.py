"""The attacks hold in a tier that is whole, and say so in one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lumaris_node.executors.container import config as container_config
from lumaris_node.executors.container.executor import ContainerExecutor
from lumaris_node.executors.port import JobSpec, LogSink, Outcome, Usage
from lumaris_node.executors.process import order as process_order
from lumaris_node.executors.process.executor import ProcessExecutor
from lumaris_node.executors.wasm.executor import WasmExecutor
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.selftest import attack, image, suite, wasm_attack
from lumaris_node.selftest.rows import INFORMATIVE, judge, tolerated
from lumaris_node.selftest.suite import Report
from lumaris_overlay.image_archive import ImageArchive
from lumaris_protocol.messages.advert import Runtime

NODE = f"selftest-{os.getpid()}"


@pytest.fixture
async def wasm(compiled: Path) -> AsyncIterator[WasmExecutor]:
    executor = WasmExecutor.open(compiled)
    yield executor
    await executor.aclose()


@pytest.fixture
async def container(docker_engine: str, tmp_path: Path) -> AsyncIterator[ContainerExecutor]:
    executor = ContainerExecutor(NODE, base_url=docker_engine, folder=tmp_path / "engine")
    yield executor
    await executor.aclose()


@pytest.fixture
async def native(native_sandbox: None, tmp_path: Path) -> AsyncIterator[ProcessExecutor]:
    store = RootfsStore(tmp_path / "rootfs", bytes_max=1 << 30)
    executor = ProcessExecutor(NODE, store)
    yield executor
    await executor.aclose()


async def attacked(
    executor: WasmExecutor | ContainerExecutor | ProcessExecutor, folder: Path
) -> Report:
    runtime = await executor.probe()
    assert runtime is not None
    report = await suite.run(executor, runtime, folder / "selftest", clock=lambda: 1000.5)
    assert (report.tier, report.at) == (runtime.tier, 1000)
    assert not list((folder / "selftest").glob("*")), "files are left"
    return report


def failures(report: Report) -> set[str]:
    return {row.name for row in report.failures}


@pytest.mark.slow
async def test_wasm_holds(wasm: WasmExecutor, tmp_path: Path):
    report = await attacked(wasm, tmp_path)
    assert failures(report) == set()
    assert {row.name for row in report.rows} == {item.row for item in wasm_attack.ATTACKS}


@pytest.mark.slow
async def test_wasm_with_more_folders_does_not_hold(
    wasm: WasmExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An executor that hands its environment on, and does not count fuel."""
    prepare = wasm.prepare

    async def leaky(spec, progress=None):
        weaker = replace(spec, environment={"SECRET": "x"}, limits=replace(spec.limits, fuel=0))
        return await prepare(weaker, progress)

    monkeypatch.setattr(wasm, "prepare", leaky)
    monkeypatch.setattr(suite, "_LIMITS", replace(suite._LIMITS, wall_s=0.5))
    monkeypatch.setattr(suite, "_ALONE_WALL_S", 0.5)
    report = await attacked(wasm, tmp_path)
    assert "environment" in failures(report)
    # Without fuel the deadline ends it: neither held off nor seen to succeed.
    assert "endless_loop" in {row.name for row in report.unshown}
    assert not report.held


class Scripted:
    """A tier in which the attack program ends and says as it is told, by its mode."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[str, str]]] = {}
        self.walls: dict[str, list[float]] = {}

    async def add_image(self, *_: object) -> None:
        return

    remove_image = add_image

    async def prepare(self, spec: JobSpec) -> JobSpec:
        return spec

    async def start(self, spec: JobSpec, log: LogSink) -> None:
        mode = spec.command[-1] if spec.command[-1] in attack.MODES else "probe"
        self.walls.setdefault(mode, []).append(spec.limits.wall_s)
        told = self.told.setdefault(mode, [])
        self.reason, said = told.pop(0) if told else ("killed_deadline", "")
        if said:
            line = json.dumps({"row": said, "open": True, "detail": ""})
            await log("stdout", line.encode() + b"\n")

    async def wait(self, spec: JobSpec) -> Outcome:
        return Outcome(self.reason, None, Usage())

    async def destroy(self, spec: JobSpec) -> None:
        return


@pytest.mark.slow
async def test_the_deadline_alone_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bomb that is too slow is repeated alone, with more time; one that succeeds has failed."""
    tier = Scripted()
    monkeypatch.setattr(suite, "_AT_ONCE", 1)
    tier.told = {
        "fork": [("killed_deadline", ""), ("killed_pids", "")],
        "memory": [("killed_deadline", ""), ("killed_deadline", "")],
        "disk": [("killed_deadline", "disk_bomb")],
    }
    runtime = Runtime(tier="process", version="1", assurance="process")
    report = await suite.run(tier, runtime, tmp_path)  # type: ignore[arg-type]
    rows = {row.name: row for row in report.rows}
    assert rows["fork_bomb"].held
    assert tier.walls["fork"] == [suite._LIMITS.wall_s, suite._ALONE_WALL_S]
    assert not rows["memory_bomb"].shown
    assert rows["disk_bomb"].failed
    assert len(tier.walls["disk"]) == 1
    assert {"survivors", "cpu_hog", "fill_tmp", "probes_ran"} <= {r.name for r in report.unshown}
    assert not report.held


@pytest.mark.slow
@pytest.mark.docker
async def test_container_holds(container: ContainerExecutor, tmp_path: Path):
    report = await attacked(container, tmp_path)
    assert failures(report) == set()
    assert report.held


@pytest.mark.slow
@pytest.mark.docker
async def test_a_container_without_our_filter_does_not_hold(
    container: ContainerExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unconfined calls, all capabilities that new privileges leave, and a writable root."""
    real = container_config._host_config

    def weakened(*arguments, **named):
        config = real(*arguments, **named)
        config["SecurityOpt"] = ["seccomp=unconfined"]
        config["ReadonlyRootfs"] = False
        return config

    monkeypatch.setattr(container_config, "_host_config", weakened)
    monkeypatch.setattr(suite, "_BOMBS", ())
    found = failures(await attacked(container, tmp_path))
    assert found >= {"no_filter", "setuid_programs", "io_uring", "vsock", "personality", "keyctl"}


@pytest.mark.slow
async def test_process_holds(native: ProcessExecutor, tmp_path: Path):
    report = await attacked(native, tmp_path)
    assert failures(report) == set()
    assert report.held


@pytest.mark.slow
async def test_a_process_in_the_host_s_network_with_capabilities_does_not_hold(
    native: ProcessExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weaker = {"--unshare-all": ("--unshare-pid", "--unshare-uts"), "--cap-drop": ("--cap-add",)}
    options = [word for old in process_order.OPTIONS for word in weaker.get(old, (old,))]
    monkeypatch.setattr(process_order, "OPTIONS", tuple(options))
    monkeypatch.setattr(suite, "_BOMBS", ())
    found = failures(await attacked(native, tmp_path))
    assert found >= {"namespace_net", "host_loopback", "host_abstract_socket", "capabilities"}
    assert "namespace_pid" not in found


# --- the program and its image -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("nonce", ["", "a" * 64, "short"])
def test_the_program_refuses_to_run_outside_its_own_root(nonce: str):
    command = [sys.executable, attack.__file__, nonce, "fork"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert done.returncode == attack.EXIT_NOT_IN_SANDBOX
    assert done.stdout == b""


def test_the_marker_must_hold_the_nonce(tmp_path: Path):
    marker = tmp_path / "marker"
    nonce = "ab" * 32
    assert not attack.in_sandbox(nonce, str(marker))
    marker.write_text("cd" * 32)
    assert not attack.in_sandbox(nonce, str(marker))
    marker.write_text("")
    assert not attack.in_sandbox("", str(marker))
    marker.write_text(nonce)
    assert attack.in_sandbox(nonce, str(marker))


@pytest.mark.slow
def test_the_image_is_whole_and_new_each_time(tmp_path: Path):
    made = [image.build(tmp_path) for _ in range(2)]
    assert made[0].digest != made[1].digest
    assert made[0].nonce != made[1].nonce
    assert ImageArchive(made[1].archive).digest == made[1].digest
    assert os.listdir(tmp_path) == ["guest.tar"]


def test_a_probe_that_breaks_counts_as_open(capfd: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise ValueError("a bug")

    def refused() -> None:
        raise PermissionError(1, "no")

    attack.attempt("one", broken)
    attack.attempt("two", refused)
    attack.attempt("three", lambda: None)
    attack.attempt("four", lambda: False)
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["open"] for line in said] == [True, False, True, False]


def test_what_a_level_tolerates_is_a_part_of_the_rows():
    assert tolerated("container") == tolerated("process") == INFORMATIVE
    assert "io_uring" in tolerated("container+gvisor")
    assert "fill_root" in tolerated("vm-emulated")
    for level in ("container+gvisor", "vm", "container+kata"):
        assert not tolerated(level) & {"host_loopback", "survivors", "memory_bomb", "cpu_hog"}
    assert judge("io_uring", held=False, assurance="container").failed
    assert not judge("io_uring", held=False, assurance="container+gvisor").failed
