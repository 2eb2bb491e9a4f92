"""The container tier on a real engine: conformance, then what only a container can try."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lumaris_node.executors.container import ContainerExecutor
from lumaris_protocol.errors import LumarisError
from tests.node.executors.conformance import MIB, Bench, Conformance, run

# A run that was killed leaves containers; they must not be taken for this run's.
NODE = f"test-{os.getpid()}-{os.urandom(4).hex()}"
SHELL = {
    "print": "echo one; echo two; echo three >&2",
    "exit3": "exit 3",
    "copy": "touch /in/x 2>/dev/null || echo refused; cat /in/a > /out/b",
    "spin": "trap '' TERM; echo on; while :; do :; done",
    "sleep": "sleep 600",
    "short": "sleep 0.5",
    "flood": "yes xxxxxxxxxxxxxxxxxxxx",
    "fill": "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/out/$n bs=1M count=1; done; sleep 60",
    "eat": "dd if=/dev/zero of=/dev/null bs=200M count=1",
    "root": "id -u; touch /x 2>&1; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status;"
    " ls /sys/class/net",
}


@pytest.fixture
async def bench(docker_engine: str, tmp_path: Path) -> AsyncIterator[Bench]:
    executor = ContainerExecutor(NODE, base_url=docker_engine)
    images = await executor.images()

    def guest(behaviour: str) -> tuple[str, tuple[str, ...]]:
        return images[0], ("/bin/sh", "-c", SHELL[behaviour])

    yield Bench(executor, tmp_path, guest)
    assert await executor.reap_orphans() == 0
    await executor.aclose()


@pytest.mark.slow
@pytest.mark.docker
class TestContainer(Conformance):
    async def test_a_command_that_is_not_there(self, bench: Bench):
        spec = bench.spec("print")
        object.__setattr__(spec, "command", ("/no/such",))
        try:
            code = (await run(bench, spec))[0].reason
        except LumarisError as error:
            code = error.code
        assert code == "bad_command"

    async def test_memory(self, bench: Bench):
        outcome, log = await run(bench, bench.spec("eat", memory_bytes=32 * MIB))
        assert outcome.reason == "killed_memory", (outcome, log)

    async def test_no_rights_and_no_network(self, bench: Bench):
        _, log = await run(bench, bench.spec("root"))
        assert b"Read-only file system" in log.stdout
        assert b"CapEff:\t0000000000000000" in log.stdout
        assert b"NoNewPrivs:\t1" in log.stdout
        assert b"Seccomp:\t2" in log.stdout
        assert log.stdout.splitlines()[0] != b"0"
        assert log.stdout.splitlines()[-1] == b"lo"

    async def test_orphans_are_removed(self, bench: Bench):
        await bench.executor.prepare(bench.spec("print"))
        successor = ContainerExecutor(NODE)
        assert await successor.reap_orphans() == 1
        await successor.aclose()


async def test_without_an_engine_the_tier_is_not_offered(tmp_path: Path):
    executor = ContainerExecutor("n", base_url=f"unix://{tmp_path}/none.sock")
    assert await executor.probe() is None
    assert await executor.images() == ()
    assert await executor.reap_orphans() == 0
    await executor.aclose()
