"""The process tier: conformance with bombs, then what only a native sandbox can try."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio

from lumaris_node.executors.process import executor as process
from lumaris_node.executors.process import launcher
from lumaris_node.executors.process import order as process_order
from lumaris_node.executors.process.executor import ProcessExecutor
from lumaris_node.images.archive import make_image, pack_folder
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.sandbox import cgroups, netns, users
from lumaris_protocol.errors import LumarisError
from tests.node.executors.conformance import (
    MIB,
    SHELL,
    Bench,
    Log,
    NativeConformance,
    run,
    running,
    started,
    until,
    until_it_prints,
)

# A run that was killed leaves groups; they must not be taken for this run's.
NODE = f"T{os.getpid() % 100_000:05}{os.urandom(3).hex()}"


@pytest.fixture(scope="session")
def image(native_sandbox: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of unpacked images with one in it: busybox and its names."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "needs a static busybox for a guest's root folder"
    folder = tmp_path_factory.mktemp("image")
    programs = folder / "root" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(busybox, programs / "busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for name in set(listed.stdout.split()) - {"busybox"}:
        (programs / name).symlink_to("busybox")
    (folder / "root" / "lib").symlink_to("usr/lib")
    (folder / "root" / "hello").write_text("hello")
    pack_folder(folder / "root", folder / "root.tar")
    environment = {"FROM_IMAGE": "yes"}
    digest = make_image(folder / "root.tar", folder / "archive", environment=environment)
    RootfsStore(folder / "images", bytes_max=64 * MIB).add(folder / "archive", digest)
    return folder / "images", digest


@pytest.fixture
async def bench(tmp_path: Path, image: tuple[Path, str]) -> AsyncIterator[Bench]:
    store, digest = image
    executor = ProcessExecutor(NODE, RootfsStore(store, bytes_max=64 * MIB))

    def guest(behaviour: str) -> tuple[str, tuple[str, ...]]:
        return digest, ("/bin/sh", "-c", SHELL.get(behaviour, behaviour))

    yield Bench(executor, tmp_path, guest)
    pid = executor.launcher_pid
    children = psutil.Process(pid).children(recursive=True) if pid else []
    await executor.aclose()
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert pid is None or not psutil.pid_exists(pid)
    assert cgroups.Cgroups().names(executor.prefix) == ()


def groups(bench: Bench) -> tuple[str, ...]:
    assert isinstance(bench.executor, ProcessExecutor)
    return cgroups.Cgroups().names(bench.executor.prefix)


@pytest.mark.slow
class TestProcess(NativeConformance):
    async def test_no_rights_and_no_network(self, bench: Bench):
        text = """id -u; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status
            for f in /x /in/x /dev/x /hello /bin/x /proc/x; do
              touch $f 2>/dev/null && echo wrote $f
            done
            ls /sys 2>/dev/null; tail -n +3 /proc/net/dev | cut -d: -f1; ls /proc/self/fd
            for c in 'unshare -r true' 'mount -t tmpfs x /tmp' 'mknod /tmp/n b 8 0' \\
              'chroot / true' 'hostname x'; do
              $c 2>/dev/null && echo done $c
            done
            hostname; ls /"""
        outcome, log = await run(bench, bench.spec(text))
        assert outcome.reason == "succeeded", (outcome, log)
        assert [line.strip().replace("\t", " ") for line in log.stdout.decode().splitlines()] == [
            "10001",
            *("CapEff: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"),
            *("lo", "0", "1", "2", "3"),  # 3 is the folder that is listed
            *("job", "bin", "dev", "hello", "in", "lib", "out", "proc", "tmp"),
        ]

    async def test_the_kernel_sees_another_user_than_root(self, bench: Bench):
        handle = await bench.executor.prepare(bench.spec("short"))
        pid = await bench.executor.network_pid(handle)
        other = await bench.executor.prepare(bench.spec("short"))
        found: list[int] = []
        for number in (pid, await bench.executor.network_pid(other)):
            inside, outside = (
                set(one.uids())
                for one in (psutil.Process(number), psutil.Process(number).parents()[0])
            )
            assert len(inside) == 1
            assert inside == outside
            assert inside < set(users.GUESTS)
            found += inside
        assert found[0] != found[1]
        await bench.executor.destroy(other)
        await bench.executor.destroy(handle)

    @pytest.mark.parametrize("uid", [0, 10007])
    async def test_a_sandbox_of_another_user_is_refused(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, uid: int
    ):
        real = process_order.order_of

        def order(*given: object) -> dict[str, object]:
            return {**real(*given), "uid": uid}  # type: ignore[arg-type]

        monkeypatch.setattr(process, "order_of", order)
        with pytest.raises(LumarisError) as caught:
            await bench.executor.prepare(bench.spec("print"))
        assert caught.value.code == "platform_error"
        assert groups(bench) == ()

    async def test_a_command_that_is_not_there(self, bench: Bench):
        outcome, _ = await run(bench, replace(bench.spec("print"), command=("/no/such",)))
        assert outcome.reason == "bad_command"
        text = "echo 'bwrap: execvp x: No such file' >&2; exit 1"
        assert (await run(bench, bench.spec(text)))[0].reason == "exit_nonzero"
        for command in ((), ("",), ("a\0b",), ("/bin/echo", "x" * 200_000)):
            with pytest.raises(LumarisError) as caught:
                await bench.executor.prepare(replace(bench.spec("print"), command=command))
            assert caught.value.code == "bad_command"

    async def test_a_job_is_prepared_once(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("short"), log) as handle:
            with pytest.raises(LumarisError) as caught:
                await bench.executor.prepare(handle.spec)
            assert caught.value.code == "platform_error"
            assert (await bench.executor.wait(handle)).reason == "succeeded"

    async def test_the_environment_is_the_images_and_the_orders(self, bench: Bench):
        spec = replace(bench.spec("env; pwd"), environment={"A": "1\n2", "HOME": "/out"})
        outcome, log = await run(bench, spec)
        assert outcome.reason == "succeeded"
        path = b"PATH=" + process_order.ENVIRONMENT["PATH"].encode()
        assert set(log.stdout.splitlines()) >= {b"A=1", b"2", b"HOME=/out", b"FROM_IMAGE=yes", path}
        assert not [line for line in log.stdout.splitlines() if line.startswith(b"LC_")]

    async def test_further_folders_are_mounted_read_only(self, bench: Bench):
        (bench.folder / "extra").mkdir(mode=0o755)
        (bench.folder / "extra" / "f").write_text("x")
        text = "cat /suite/f; touch /suite/g 2>/dev/null || echo refused"
        spec = replace(bench.spec(text), mounts=((bench.folder / "extra", "/suite"),))
        assert (await run(bench, spec))[1].stdout == b"xrefused\n"
        spec = replace(spec, mounts=((bench.folder / "extra", "/../x"),))
        with pytest.raises(LumarisError):
            await bench.executor.prepare(spec)

    async def test_nothing_need_be_open_to_the_guests_user(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ):
        package, private = process_order.bubblewrap().parents[1], bench.folder / "private"
        for part in (package, package.with_suffix(".libs")):
            shutil.copytree(part, private / part.name)
        private.chmod(0o700)
        program = private / package.name / "_bin" / "bwrap"
        monkeypatch.setattr(process_order, "bubblewrap", lambda: program)
        assert (await run(bench, bench.spec("print")))[0].reason == "succeeded"

    async def test_memory_disks_have_few_files(self, bench: Bench):
        text = "cd /tmp; seq 1 6000 | xargs touch 2>/dev/null; ls /tmp | wc -l"
        _, log = await run(bench, bench.spec(text))
        assert 0 < int(log.stdout) <= process_order.MEMORY_DISK_FILES_MAX

    async def test_ports_of_a_job_are_reached_from_outside(self, bench: Bench):
        log = Log()
        spec = bench.spec("nc -l -p 7000 -e /bin/cat & echo on; wait")
        async with started(bench, spec, log) as handle:
            await until_it_prints(bench, handle, log)
            pid = await bench.executor.network_pid(handle)
            async with await connect_soon(pid, 7000) as stream:
                await stream.send_all(b"ping")
                assert await stream.receive_some(4) == b"ping"
                with pytest.raises(LumarisError) as caught:  # the job lives while this is open
                    await netns.connect(pid, 7001)
                assert caught.value.code == "unreachable"
        with pytest.raises(LumarisError) as caught:
            await bench.executor.network_pid(handle)
        assert caught.value.code == "not_attached"

    async def test_a_service_is_offered_into_a_job(self, bench: Bench):
        handle = await bench.executor.prepare(
            bench.spec("echo ping | nc 127.0.0.1 7002 > /out/answer; cat /out/answer")
        )
        log = Log()
        try:
            pid = await bench.executor.network_pid(handle)
            async with await netns.listen(pid, 7002) as listener, trio.open_nursery() as nursery:
                with pytest.raises(LumarisError) as caught:
                    await netns.listen(pid, 7002)
                assert caught.value.code == "port_in_use"

                async def answer() -> None:
                    async with await listener.accept() as stream:
                        await stream.send_all(await stream.receive_some(100) + b"pong\n")

                nursery.start_soon(answer)
                await bench.executor.start(handle, log)
                assert (await bench.executor.wait(handle)).reason == "succeeded", log
        finally:
            await bench.executor.destroy(handle)
        assert log.stdout == b"ping\npong\n"

    async def test_a_hundred_killed_jobs_leave_nothing(self, bench: Bench):
        handles = len(os.listdir("/proc/self/fd"))
        for number in range(100):
            log = Log()
            spec = bench.spec("double" if number % 10 == 0 else "spin")
            async with started(bench, spec, log) as handle:
                if number % 3 == 0:
                    await until_it_prints(bench, handle, log)
                await bench.executor.cancel(handle, "cancelled")
                assert (await bench.executor.wait(handle)).reason == "cancelled"
        assert groups(bench) == ()
        assert bench.survivors() == []
        assert bench.folder.name not in Path("/proc/self/mountinfo").read_text()
        assert len(os.listdir("/proc/self/fd")) <= handles + 4  # the launcher's and trio's own
        pid = bench.executor.launcher_pid  # type: ignore[attr-defined]
        await until(lambda: not psutil.Process(pid).children())
        assert len(os.listdir(f"/proc/{pid}/fd")) < 16

    async def test_a_dead_launcher_is_a_platform_error_and_is_replaced(self, bench: Bench):
        assert isinstance(bench.executor, ProcessExecutor)
        log = Log()
        async with started(bench, bench.spec("double"), log) as handle:
            await until_it_prints(bench, handle, log)
            assert bench.executor.launcher_pid is not None
            os.kill(bench.executor.launcher_pid, signal.SIGKILL)
            assert (await bench.executor.wait(handle)).reason == "platform_error"
        assert bench.survivors() == []
        assert (await run(bench, bench.spec("print")))[0].reason == "succeeded"

    @pytest.mark.parametrize("also_the_launcher", [False, True], ids=["node", "both"])
    async def test_a_killed_node_leaves_nothing(
        self, bench: Bench, image: tuple[Path, str], also_the_launcher: bool
    ):
        spec = bench.spec("double")
        program = f"""
import trio
from pathlib import Path
from lumaris_node.executors.port import JobSpec
from lumaris_node.executors.process.executor import ProcessExecutor
from lumaris_node.images.rootfs import RootfsStore
from tests.node.executors.conformance import LIMITS
async def log(stream, data):
    print(executor.launcher_pid, flush=True)
async def main():
    global executor
    executor = ProcessExecutor({NODE!r}, RootfsStore(Path({str(image[0])!r}), bytes_max=1 << 26))
    spec = JobSpec({spec.job!r}, {spec.image!r}, {spec.command!r}, {spec.environment!r},
        Path({str(spec.inputs)!r}), Path({str(spec.outputs)!r}), LIMITS)
    handle = await executor.prepare(spec)
    await executor.start(handle, log)
    await executor.wait(handle)
trio.run(main)"""
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as node:  # noqa: ASYNC220 - ends in here
            assert node.stdout is not None
            pid = int(await trio.to_thread.run_sync(node.stdout.readline))
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            assert bench.survivors()
            if also_the_launcher:
                os.kill(pid, signal.SIGKILL)
            node.kill()
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert bench.survivors() == []
        if also_the_launcher:
            assert await bench.executor.reap_orphans() == 1
        assert groups(bench) == ()
        assert await bench.executor.reap_orphans() == 0

    async def test_a_slow_reader_holds_the_guest_back(self, bench: Bench):
        read = 0

        async def slow(_stream: str, data: bytes) -> None:
            nonlocal read
            read += len(data)
            await trio.sleep_forever()

        handle = await bench.executor.prepare(bench.spec("flood", wall_s=0.5))
        try:
            await bench.executor.start(handle, slow)
            with trio.move_on_after(1.0):
                await bench.executor.wait(handle)
            assert read <= 64 * 1024
        finally:
            await bench.executor.destroy(handle)
        assert groups(bench) == ()

    async def test_the_processor_is_shared_as_agreed(self, bench: Bench):
        text = "(while :; do :; done) & while :; do :; done"
        outcome, _ = await run(bench, bench.spec(text, wall_s=1.0, cpu_millis=200))
        assert outcome.reason == "killed_deadline"
        # The making of the sandbox counts too, and the quota is refilled each 100 ms.
        assert outcome.usage.cpu_ms <= 0.2 * outcome.usage.wall_ms + 150

    async def test_a_guest_may_be_small(self, bench: Bench):
        outcome, _ = await run(bench, bench.spec("print", memory_bytes=4 * MIB, pids=4))
        assert outcome.reason == "succeeded"
        assert 0 < outcome.usage.memory_peak_bytes <= 4 * MIB

    async def test_two_jobs_at_once_do_not_meet(self, bench: Bench):
        first, second = Log(), Log()
        async with (
            running(bench, bench.spec("leave; echo x > /dev/shm/y; sleep 600"), first),
            started(bench, bench.spec("look"), second) as handle,
        ):
            assert (await bench.executor.wait(handle)).reason == "succeeded"
            assert second.stdout == b"clean\n"
            for other in list(bench.executor._runs.values()):  # type: ignore[attr-defined]
                await bench.executor.cancel(other, "cancelled")


async def connect_soon(pid: int, port: int) -> trio.SocketStream:
    with trio.fail_after(10):
        while True:
            try:
                return await netns.connect(pid, port)
            except LumarisError:
                await trio.sleep(0.02)


async def test_our_own_network_is_no_sandboxs():
    with pytest.raises(LumarisError) as caught:
        await netns.connect(os.getpid(), 22)
    assert caught.value.code == "not_attached"
    with pytest.raises(LumarisError):
        await netns.listen(2**22 - 1, 0)


def test_root_is_given_up_or_nothing_runs():
    with pytest.raises(PermissionError):
        launcher.drop_root(0)


async def test_without_control_groups_the_tier_is_not_offered(tmp_path: Path):
    store = RootfsStore(tmp_path / "images", bytes_max=MIB)
    executor = ProcessExecutor("n", store, cgroup_root=tmp_path / "none")
    assert await executor.probe() is None
    assert await executor.reap_orphans() == 0
    await executor.aclose()
