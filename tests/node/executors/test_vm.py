"""The vm tier on an emulated processor: conformance, then what only a machine can try.

Every test boots machines of its own, seconds each. A machine is never shared by two orders, so
the suite runs for orders alone and not once more within a lease.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lumaris_node.executors.vm import executor as vm_executor
from lumaris_node.executors.vm.executor import VmExecutor
from lumaris_node.executors.vm.machine import EMULATOR_UID, Accel
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.sandbox.cgroups import Cgroups, unavailable
from lumaris_protocol.errors import LumarisError
from tests.node.executors.conformance import (
    SHELL,
    Bench,
    Log,
    NativeConformance,
    run,
    started,
    until,
)
from tests.node.images.tars import file, folder, image, pack, symlink

APPLETS = """
awk cat dd df echo env false grep id ln ls mkdir mkfifo mount printf ps rm seq setsid sh sleep
touch true yes
"""
# A boot takes three seconds on an idle machine.
PATIENCE_S = 90
LOOK = (
    "id -u; id -g; grep -E 'CapEff|NoNewPrivs' /proc/self/status; ls /sys 2>&1; ls /dev;"
    " touch /x 2>&1; ls /proc | grep -c '^1$'; cat /proc/net/dev | grep -c :"
)
TRICKS = {
    "link": "ln -s /etc/shadow /out/a",
    "hard": "echo x >/out/a; ln /out/a /out/b",
}


def kernel() -> Path | None:
    found = sorted(Path("/boot").glob("vmlinuz-*"))
    return next((path for path in found if Path("/lib/modules", path.name[8:]).is_dir()), None)


@pytest.fixture(scope="session")
def boot_kernel() -> Path:
    """A kernel to boot. Where something is missing the test is skipped, or fails if required."""
    wanted = ("qemu-system-x86_64", "busybox", "mkfs.ext4")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in wanted if shutil.which(name, path=path) is None]
    found = kernel()
    if found is None:
        missing.append("a kernel with modules in /boot")
    if missing:
        reason = f"needs {', '.join(missing)}"
        if os.environ.get("LUMARIS_REQUIRE_VM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def shell_image(boot_kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An archive of an image with a POSIX shell, and its digest."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    made = tmp_path_factory.mktemp("image")
    members = [folder("bin"), file("bin/busybox", Path(busybox).read_bytes(), 0o755)]
    members += [symlink(f"bin/{name}", "busybox") for name in APPLETS.split()]
    settings = {"Env": ["FROM_IMAGE=yes", "PATH=/bin"]}
    return image(made, pack(*members), config=settings)


@pytest.fixture(scope="session")
def rootfs(shell_image: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> RootfsStore:
    store = RootfsStore(tmp_path_factory.mktemp("rootfs"), bytes_max=1 << 30)
    store.add(*shell_image)
    return store


def executor_of(
    rootfs: RootfsStore, kernel: Path, folder: Path, *, node: str, accel: Accel = "tcg"
) -> VmExecutor:
    return VmExecutor(rootfs, kernel=kernel, accel=accel, directory=folder, node=node)


@pytest.fixture
async def bench(
    rootfs: RootfsStore, shell_image: tuple[Path, str], boot_kernel: Path, tmp_path: Path
) -> AsyncIterator[Bench]:
    node = os.urandom(6).hex()
    directory = tmp_path / "vm"
    executor = executor_of(rootfs, boot_kernel, directory, node=node)
    texts = {**SHELL, **TRICKS, "self": LOOK}

    def guest(behaviour: str) -> tuple[str, tuple[str, ...]]:
        return shell_image[1], ("/bin/sh", "-c", texts.get(behaviour, behaviour))

    yield Bench(executor, tmp_path, guest, patience_s=PATIENCE_S)
    assert machines(node) == []
    assert await executor.reap_orphans() == 0
    await executor.aclose()


def machines(node: str) -> list[int]:
    """Emulators and guards of a node that live."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if f"lumaris-{node}-vm-".encode() in line:
                found.append(int(name))
    return found


@pytest.mark.slow
class TestVm(NativeConformance):
    @pytest.fixture
    async def tier(self, bench: Bench) -> AsyncIterator[Bench]:
        yield bench
        assert bench.survivors() == []

    async def test_a_command_that_is_not_there(self, bench: Bench):
        for command in ("/bin", "no-such"):
            spec = replace(bench.spec("print"), command=(command,))
            with pytest.raises(LumarisError) as caught:
                await run(bench, spec)
            assert caught.value.code == "bad_command"

    async def test_no_rights_no_devices_and_no_network(self, bench: Bench):
        outcome, log = await run(bench, bench.spec("self"))
        assert outcome.reason == "succeeded", (outcome, log)
        lines = log.stdout.decode().splitlines()
        assert lines[:2] == ["10001", "10001"]
        assert "CapEff:\t0000000000000000" in lines
        assert "NoNewPrivs:\t1" in lines
        assert not [line for line in lines if line.startswith(("vport", "vd", "kmsg", "mem"))]
        assert any("Permission denied" in line for line in lines)
        assert lines[-2:] == ["0", "1"]  # our init is hidden, and there is a loopback only

    async def test_arguments_and_environment_arrive_as_given(self, bench: Bench):
        spec = bench.spec('printf "%s|" "$@"; printf "%s|" "$A" "$FROM_IMAGE" "$PWD"')
        words = ("x", "it's", "two\nlines", "$HOME `id`", "", "ä")
        spec = replace(
            spec,
            command=(*spec.command, *words),
            environment={**spec.environment, "A": "b'c\n\"$(id)"},
        )
        outcome, log = await run(bench, spec)
        assert outcome.reason == "succeeded", (outcome, log)
        said = log.stdout.decode().split("|")
        assert said == [*words[1:], "b'c\n\"$(id)", "yes", "/out", ""]

    async def test_further_folders_are_read_only(self, bench: Bench, tmp_path: Path):
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "a").write_bytes(b"hello")
        spec = bench.spec("cat /suite/a; echo x 2>&1 >/suite/b")
        outcome, log = await run(bench, replace(spec, mounts=((tmp_path / "more", "/suite"),)))
        assert outcome.reason == "exit_nonzero", (outcome, log)
        assert log.stdout.startswith(b"hello")
        assert b"Read-only" in log.stdout + log.stderr

    @pytest.mark.parametrize("trick", sorted(TRICKS))
    async def test_outputs_that_are_refused(self, bench: Bench, trick: str):
        outcome, log = await run(bench, bench.spec(trick))
        assert (outcome.reason, outcome.exit_status) == ("killed_output", None), (outcome, log)

    async def test_long_output_arrives_whole_for_a_slow_reader(self, bench: Bench):
        spec, log = bench.spec("seq 1 40000; seq 1 9 >&2"), Log()

        async def slowly(stream: str, data: bytes) -> None:
            await trio.sleep(0.01)
            await log(stream, data)

        handle = await bench.executor.prepare(spec)
        try:
            await bench.executor.start(handle, slowly)
            outcome = await bench.executor.wait(handle)
        finally:
            await bench.executor.destroy(handle)
        assert outcome.reason == "succeeded"
        assert log.stdout == b"".join(b"%d\n" % n for n in range(1, 40001))
        assert log.stderr == b"".join(b"%d\n" % n for n in range(1, 10))
        assert 0 < outcome.usage.memory_peak_bytes <= spec.limits.memory_bytes

    async def test_the_emulator_has_no_rights(self, bench: Bench):
        handle = await bench.executor.prepare(bench.spec("print"))
        try:
            pid = handle.private["run"].machine.pid  # type: ignore[attr-defined]
            status = Path(f"/proc/{pid}/status").read_text()
            assert "Seccomp:\t2" in status
            if os.geteuid() == 0:
                assert "Uid:" + f"\t{EMULATOR_UID}" * 4 in status
                assert "CapEff:\t0000000000000000" in status
                assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            assert sorted(os.listdir(handle.spec.outputs.parent)) == ["in", "out"]
        finally:
            await bench.executor.destroy(handle)

    async def test_a_machine_that_dies_is_our_fault(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("spin"), log) as handle:
            os.kill(handle.private["run"].machine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            outcome = await bench.executor.wait(handle)
        assert outcome.reason == "platform_error"

    async def test_an_emulated_machine_is_not_sold_as_one(self, bench: Bench):
        runtime = await bench.executor.probe()
        assert runtime is not None
        assert runtime.assurance == "vm-emulated"


NODE_THAT_DIES = """
import sys, trio
from pathlib import Path
from lumaris_node.executors.port import JobLimits, JobSpec
from lumaris_node.executors.vm.executor import VmExecutor
from lumaris_node.images.rootfs import RootfsStore

async def main():
    store, kernel, work, image, node = sys.argv[1:]
    work = Path(work)
    rootfs = RootfsStore(Path(store), bytes_max=1 << 30)
    folder = work / "vm"
    executor = VmExecutor(rootfs, kernel=Path(kernel), accel="tcg", directory=folder, node=node)
    bounds = JobLimits(1000, 64 << 20, 1 << 20, 60, 0, 1000, 1000, 1)
    (work / "in").mkdir(), (work / "out").mkdir()
    spec = JobSpec("job", image, ("/bin/sleep", "600"), {}, work / "in", work / "out", bounds)
    await executor.prepare(spec)
    print("up", flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.slow
async def test_a_killed_node_leaves_no_machine(
    rootfs: RootfsStore, shell_image: tuple[Path, str], boot_kernel: Path, tmp_path: Path
):
    node = os.urandom(6).hex()
    arguments = (rootfs.directory, boot_kernel, tmp_path, shell_image[1], node)
    program = [sys.executable, "-c", NODE_THAT_DIES, *map(str, arguments)]
    process = await trio.lowlevel.open_process(program, stdout=subprocess.PIPE)
    with trio.fail_after(60):
        assert process.stdout is not None
        assert await process.stdout.receive_some(2) == b"up"
        assert len(machines(node)) == 2  # the emulator and its guard
        process.kill()
        await process.wait()
        await process.stdout.aclose()
    await until(lambda: machines(node) == [])
    successor = executor_of(rootfs, boot_kernel, tmp_path / "vm", node=node)
    await successor.reap_orphans()
    if not unavailable():
        assert Cgroups().names(f"lumaris-{node}-") == ()
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "vm"]


@pytest.mark.slow
async def test_a_probe_that_hangs_ends_in_time(
    rootfs: RootfsStore, boot_kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """/dev/kvm may be there and work or hang: the answer comes within the limit, nothing stays."""
    monkeypatch.setitem(
        vm_executor.PROBE_S_MAX,
        "kvm",
        4,
    )
    node = os.urandom(6).hex()
    executor = executor_of(rootfs, boot_kernel, tmp_path, node=node, accel="kvm")
    with trio.fail_after(30):
        runtime = await executor.probe()
    assert runtime is None or runtime.assurance == "vm"
    assert machines(node) == []
    await executor.aclose()


async def test_without_a_kernel_the_tier_is_not_offered(tmp_path: Path):
    store = RootfsStore(tmp_path / "rootfs", bytes_max=1 << 20)
    for kernel in (None, tmp_path / "vmlinuz-none"):
        executor = VmExecutor(store, kernel=kernel, directory=tmp_path / "vm")
        assert await executor.probe() is None
        assert await executor.images() == ()
        await executor.release("lease")
        await executor.aclose()
