"""Engines that stop, die, restart and isolate otherwise; each test has an engine of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lumaris_node.executors.container.executor import ContainerExecutor
from tests.node.executors.conformance import MIB, SHELL, Bench, Log, run, running, until

pytestmark = [pytest.mark.slow, pytest.mark.docker]
SCRIPT = Path(__file__).parents[2] / "engine.sh"
RUNSC = '#!/bin/sh\nexec runsc --platform=ptrace --network=none "$@"\n'


class OwnEngine:
    """A Docker engine in a folder, that a test may kill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.options, self.prefix = folder, list[str](), list[str]()
        self.url = f"unix://{folder}/d.sock"

    def up(self) -> None:
        command = [*self.prefix, str(SCRIPT), "up", str(self.folder), *self.options]
        subprocess.run(command, check=True, timeout=60)

    def down(self) -> None:
        subprocess.run([SCRIPT, "down", self.folder], check=True, timeout=60)

    def signal(self, number: signal.Signals) -> None:
        os.kill(int((self.folder / "d.pid").read_text()), number)

    def shims(self) -> list[str]:
        """Shims of this engine that live."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().decode()
                except OSError:
                    continue
                if "containerd-shim" in line and str(self.folder) in line:
                    found.append(line)
        return found

    def containers(self) -> list[str]:
        listed = subprocess.run(
            ["docker", "-H", self.url, "ps", "-aq"], check=True, capture_output=True, text=True
        )
        return listed.stdout.split()


@contextmanager
def own_engine() -> Iterator[OwnEngine]:
    missing = [name for name in ("dockerd", "docker", "busybox") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        reason = "needs root and dockerd, docker and busybox to start an engine of its own"
        if os.environ.get("LUMARIS_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="lumaris-e-"))
    found = OwnEngine(folder)
    try:
        yield found
    finally:
        found.down()
        shutil.rmtree(folder)


@pytest.fixture
def engine() -> Iterator[OwnEngine]:
    with own_engine() as found:
        found.up()
        yield found


async def bench_of(engine: OwnEngine, folder: Path, runtime: str = "") -> Bench:
    executor = ContainerExecutor("faults", base_url=engine.url, runtime=runtime)
    assert await executor.probe() is not None
    images = await executor.images()
    return Bench(executor, folder, lambda name: (images[0], ("/bin/sh", "-c", SHELL[name])))


def cgroups(containers: list[str]) -> list[str]:
    return [
        path
        for path, _, _ in os.walk("/sys/fs/cgroup")
        if any(identity in path for identity in containers)
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
@pytest.mark.parametrize("lease", ["", "lease"], ids=["alone", "leased"])
async def test_an_engine_that_goes_in_mid_job(
    engine: OwnEngine, tmp_path: Path, number: signal.Signals, lease: str
):
    bench, log = await bench_of(engine, tmp_path), Log()
    bench.lease = lease
    async with running(bench, bench.spec("spin", wall_s=60), log) as (_, ended):
        await until(lambda: log.stdout == b"on\n")
        began = trio.current_time()
        engine.signal(number)
        await until(lambda: bool(ended), within_s=15)
        assert ended[0].reason == "platform_error", ended
        assert trio.current_time() - began < 8
    assert bench.survivors() == []
    await until(lambda: not (engine.folder / "d.pid").exists() or number == signal.SIGKILL)
    with trio.fail_after(2):
        assert await bench.executor.probe() is None
    await trio.to_thread.run_sync(engine.up)
    assert await bench.executor.probe() is not None
    outcome, _ = await run(bench, bench.spec("print"))
    assert outcome.reason == "succeeded", outcome
    await bench.executor.release(lease)
    await bench.executor.reap_orphans()
    assert engine.containers() == []
    await until(lambda: engine.shims() == [])
    await bench.executor.aclose()


async def test_a_hundred_killed_jobs_leave_nothing(engine: OwnEngine, tmp_path: Path):
    bench, made = await bench_of(engine, tmp_path), []
    lanes = trio.CapacityLimiter(4)

    async def kill_one(number: int) -> None:
        async with lanes:
            log, name = Log(), ("spin", "double", "sleep", "flood")[number % 4]
            spec = bench.spec(name, wall_s=0.2)
            handle = await bench.executor.prepare(spec)
            made.append(handle.private["run"].sandbox.container)  # type: ignore[attr-defined]
            try:
                await bench.executor.start(handle, log)
                assert (await bench.executor.wait(handle)).reason.startswith("killed_")
            finally:
                await bench.executor.destroy(handle)

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(kill_one, number)
    assert len(set(made)) == 100
    assert bench.survivors() == []
    assert engine.containers() == []
    assert cgroups(made) == []
    await until(lambda: engine.shims() == [])
    await bench.executor.aclose()


async def test_gvisor(tmp_path: Path):
    if shutil.which("runsc") is None:
        pytest.skip("needs runsc (Debian package of that name)")
    with own_engine() as engine:
        wrapper = engine.folder / "runsc.sh"
        wrapper.write_text(RUNSC)
        wrapper.chmod(0o755)
        engine.options = ["--add-runtime", f"runsc={wrapper}"]
        engine.up()
        bench = await bench_of(engine, tmp_path)
        runtime = await bench.executor.probe()
        assert runtime is not None
        assert runtime.assurance == "gvisor"
        assert runtime.features == ("exec", "stdin")
        bench.lease = "lease"
        for _ in range(2):
            assert (await run(bench, bench.spec("look")))[1].stdout == b"clean\n"
            assert (await run(bench, bench.spec("leave")))[0].reason == "succeeded"
        assert (await run(bench, bench.spec("spin", wall_s=0.5)))[0].reason == "killed_deadline"
        outcome, _ = await run(bench, bench.spec("memory", memory_bytes=96 * MIB))
        assert outcome.reason == "killed_memory", outcome
        plain = ContainerExecutor("faults", base_url=engine.url, runtime="runc")
        found = await plain.probe()
        assert found is not None
        assert found.assurance == "container"
        await plain.aclose()
        assert engine.containers() == []
        await bench.executor.aclose()


async def test_user_namespaces(tmp_path: Path):
    with own_engine() as engine:
        # Subordinate ids are named in /etc, and this machine's stays as it is.
        etc = engine.folder / "etc"
        shutil.copytree("/etc", etc, symlinks=True)
        engine.folder.chmod(0o711)
        for name in ("subuid", "subgid"):
            (etc / name).write_text("nobody:100000:65536\n")
        (etc / "group").write_text((etc / "group").read_text() + "nobody:x:65533:\n")
        engine.options = ["--userns-remap", "nobody"]
        engine.prefix = ["unshare", "-m", "sh", "-c", f'mount --bind {etc} /etc; exec "$@"', "-"]
        engine.up()
        bench = await bench_of(engine, tmp_path)
        runtime = await bench.executor.probe()
        assert runtime is not None
        assert runtime.assurance == "container+userns"
        spec = bench.spec("copy")
        (spec.inputs / "a").write_bytes(b"hello")
        outcome, log = await run(bench, spec)
        assert outcome.reason == "succeeded", (outcome, log)
        assert (spec.outputs / "b").read_bytes() == b"hello"
        assert (spec.outputs / "b").stat().st_uid == 110_001
        await bench.executor.aclose()
