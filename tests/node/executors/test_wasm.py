"""The wasm tier: conformance, then what only a wasm guest can try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
import wasmtime

from lumaris_node.executors.modules import ModuleStore
from lumaris_node.executors.wasm import WasmExecutor
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from tests.node.executors.conformance import (
    MIB,
    Bench,
    Conformance,
    Log,
    run,
    started,
    until_it_prints,
)

PYTHON = CATALOG["python:3.12-wasi"].digest
CODE = {
    "print": "import sys; print('one'); print('two'); print('three', file=sys.stderr)",
    "exit3": "import sys; sys.exit(3)",
    "copy": """
try: open('/in/x', 'w'); print('written')
except OSError: print('refused')
open('/out/b', 'w').write(open('/in/a').read())""",
    "spin": "print('on', flush=True)\nwhile True: pass",
    "sleep": "import time; time.sleep(600)",
    "short": "import time; time.sleep(0.5)",
    "flood": "while True: print('x' * 1000)",
    "fill": """
import time
for n in range(9): open(f'/out/{n}', 'wb').write(bytes(1 << 20))
time.sleep(60)""",
}
WAT = {
    "trap": '(module (memory (export "memory") 1) (func (export "_start") unreachable))',
    "loop": '(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))',
    "deep": '(module (memory (export "memory") 1) (func $f (export "_start") (call $f)))',
    "eat": """(module (memory (export "memory") 1) (func (export "_start")
      (loop (br_if 0 (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable))""",
    "huge": '(module (memory (export "memory") 60000) (func (export "_start")))',
    "foreign": '(module (import "env" "x" (func)) (func (export "_start")))',
    "reactor": '(module (func (export "run")))',
}


@pytest.fixture(scope="session")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests, so that the interpreter is compiled once."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
async def bench(tmp_path: Path, module_folder: Path) -> AsyncIterator[Bench]:
    executor = WasmExecutor.open(module_folder)

    def guest(behaviour: str) -> tuple[str, tuple[str, ...]]:
        if behaviour in CODE:
            return PYTHON, ("python", "-c", CODE[behaviour])
        module = bytes(wasmtime.wat2wasm(WAT[behaviour]))
        source = tmp_path / behaviour
        source.write_bytes(module)
        executor.modules.add(source, digest(module))
        return digest(module), ("guest",)

    yield Bench(executor, tmp_path, guest)
    pid = executor.zygote_pid
    children = psutil.Process(pid).children() if pid else []
    await executor.aclose()
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert pid is None or not psutil.pid_exists(pid)


@pytest.mark.slow
@pytest.mark.planet
class TestWasm(Conformance):
    async def test_traps_and_limits(self, bench: Bench):
        async def ended(behaviour: str, **bounds: float) -> str:
            return (await run(bench, bench.spec(behaviour, **bounds)))[0].reason

        assert await ended("trap") == "killed_trap"
        assert await ended("deep") == "killed_trap"
        assert await ended("loop", fuel=100_000) == "killed_fuel"
        assert await ended("loop", wall_s=0.2) == "killed_deadline"
        assert await ended("eat", memory_bytes=16 * MIB) == "killed_memory"
        assert await ended("huge", memory_bytes=16 * MIB) == "killed_memory"

    @pytest.mark.parametrize("behaviour", ["foreign", "reactor"])
    async def test_modules_that_are_not_accepted(self, bench: Bench, behaviour: str):
        with pytest.raises(LumarisError) as caught:
            await bench.executor.prepare(bench.spec(behaviour))
        assert caught.value.code == "bad_image"

    async def test_nothing_but_its_folders_is_seen(self, bench: Bench):
        spec = bench.spec("print")
        (spec.inputs / "link").symlink_to("/etc/passwd")
        (bench.folder / "secret").write_text("s")
        (spec.outputs / "up").symlink_to("../../../secret")
        code = """
import os
for path in ('/etc/passwd', '/in/../../secret', '/in/link', '/out/up', '../secret',
             '/proc/self/environ'):
    try: print(path, open(path).read()[:9])
    except OSError: pass
print(dict(os.environ))"""
        spec = replace(spec, command=("python", "-c", code))
        outcome, log = await run(bench, spec)
        assert outcome.reason == "succeeded", log
        assert log.stdout == b"{'PYTHONHASHSEED': '0'}\n"

    async def test_the_same_job_twice_is_the_same(self, bench: Bench):
        code = "import os, time; print(os.urandom(8), time.time(), time.monotonic(), hash('a'))"
        one = replace(bench.spec("print"), command=("python", "-c", code))
        first, second = await run(bench, one), await run(bench, one)
        other = await run(bench, replace(one, job=bench.spec("print").job))
        assert first[1].stdout == second[1].stdout != other[1].stdout
        assert first[0].usage.fuel == second[0].usage.fuel > 0

    async def test_a_dead_zygote_is_a_platform_error_and_is_replaced(self, bench: Bench):
        assert isinstance(bench.executor, WasmExecutor)
        log = Log()
        async with started(bench, bench.spec("spin"), log) as handle:
            await until_it_prints(bench, handle, log)
            assert bench.executor.zygote_pid is not None
            os.kill(bench.executor.zygote_pid, signal.SIGKILL)
            assert (await bench.executor.wait(handle)).reason == "platform_error"
        assert (await run(bench, bench.spec("print")))[0].reason == "succeeded"

    async def test_a_killed_node_leaves_no_process(self, tmp_path: Path, module_folder: Path):
        program = f"""
import trio
from pathlib import Path
from lumaris_node.executors.wasm import WasmExecutor
async def main():
    executor = WasmExecutor.open(Path({str(module_folder)!r}))
    assert await executor.probe()
    print(executor.zygote_pid, flush=True)
    await trio.sleep_forever()
trio.run(main)"""
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as node:  # noqa: ASYNC220 - ends in here
            assert node.stdout is not None
            zygote = psutil.Process(int(await trio.to_thread.run_sync(node.stdout.readline)))
            family = [zygote, *zygote.children()]
            node.kill()
        assert not psutil.wait_procs(family, timeout=5)[1]
        executor = WasmExecutor.open(module_folder)
        assert await executor.reap_orphans() == 0
        assert not [name for name in os.listdir(module_folder) if name.endswith(".part")]


def test_a_module_under_a_false_digest_is_refused(tmp_path: Path):
    store = ModuleStore(tmp_path / "store")
    (tmp_path / "m").write_bytes(b"\0asm")
    with pytest.raises(LumarisError) as caught:
        store.add(tmp_path / "m", digest(b"other"))
    assert caught.value.code == "bad_image"
    assert list(store.directory.iterdir()) == []
    assert not store.has("../../etc/passwd")
