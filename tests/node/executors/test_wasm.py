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

from lumaris_node.executors.wasm import modules
from lumaris_node.executors.wasm.executor import GUEST_UID, WasmExecutor
from lumaris_node.executors.wasm.modules import ModuleStore
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
    "polite": "import time; print('on', flush=True); time.sleep(600)",
    "echo": """
import sys
for line in sys.stdin: print(line, end='', flush=True)""",
    "leave": """
import sys
sys.path.append('left'); sys.modules['left'] = sys
open('/out/left', 'w').write('x')
print('left', end='')""",
    "look": """
import os, sys
found = [name for name in os.environ if name == 'SECRET'] + os.listdir('/out')
print('clean' if not found and 'left' not in sys.modules else found)""",
}
WAT = {
    "trap": '(module (memory (export "memory") 1) (func (export "_start") unreachable))',
    "loop": '(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))',
    "deep": '(module (memory (export "memory") 1) (func $f (export "_start") (call $f)))',
    "eat": """(module (memory (export "memory") 1) (func (export "_start")
      (loop (br_if 0 (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable))""",
    "greedy": """(module (memory (export "memory") 1) (func (export "_start")
      (drop (memory.grow (i32.const 30000))) unreachable))""",
    "frugal": """(module (memory (export "memory") 1) (func (export "_start")
      (drop (memory.grow (i32.const 255))) unreachable))""",
    "content": """(module (memory (export "memory") 1) (func (export "_start")
      (drop (memory.grow (i32.const 30000)))))""",
    "nothing": '(module (memory (export "memory") 1) (func (export "_start")))',
    "huge": '(module (memory (export "memory") 60000) (func (export "_start")))',
    "foreign": '(module (import "env" "x" (func)) (func (export "_start")))',
    "reactor": '(module (func (export "run")))',
}


@pytest.fixture(scope="session")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests, with the interpreter compiled."""
    folder = tmp_path_factory.mktemp("modules")
    trio.run(WasmExecutor.open(folder).compile, PYTHON)
    return folder


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

    yield Bench(executor, tmp_path, guest, signals=False)
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
        # What counts is that memory was refused, and not how much of it was used.
        assert await ended("greedy", memory_bytes=16 * MIB) == "killed_memory"
        assert await ended("frugal", memory_bytes=16 * MIB) == "killed_trap"
        assert await ended("content", memory_bytes=16 * MIB) == "succeeded"

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
print({name: os.environ[name] for name in os.environ if name != 'LUMARIS_TEST_MARK'})"""
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

    async def test_a_lease_keeps_its_worker_and_nothing_of_an_order(self, bench: Bench):
        executor = _wasm(bench)
        bench.lease = "first"
        fuel, pids, held = set(), set(), set()
        for _ in range(4):
            outcome, _ = await run(bench, bench.spec("print"))
            fuel.add(outcome.usage.fuel)
            pid = executor.worker_pid("first")
            assert pid is not None
            pids.add(pid)
            held.add((len(os.listdir(f"/proc/{pid}/fd")), _guest_bytes(pid)))
        assert len(pids) == len(fuel) == 1
        assert {memory for _, memory in held} == {0}
        assert len({files for files, _ in held}) == 1
        bench.lease = "second"
        await run(bench, bench.spec("nothing"))
        assert executor.worker_pid("second") not in {None, *pids}
        await executor.release("first")
        assert executor.worker_pid("first") is None
        assert not any(psutil.pid_exists(pid) for pid in pids)

    async def test_a_killed_worker_is_replaced(self, bench: Bench):
        executor = _wasm(bench)
        bench.lease = "lease"
        await run(bench, bench.spec("nothing"))
        before = executor.worker_pid("lease")
        assert (await run(bench, bench.spec("loop", wall_s=0.2)))[0].reason == "killed_deadline"
        assert (await run(bench, bench.spec("loop", fuel=1000)))[0].reason == "killed_fuel"
        middle = executor.worker_pid("lease")
        assert middle not in {None, before}
        assert middle is not None
        os.kill(middle, signal.SIGKILL)  # between two orders
        psutil.wait_procs([psutil.Process(middle)] if psutil.pid_exists(middle) else [], 5)
        assert (await run(bench, bench.spec("nothing")))[0].reason == "succeeded"

    async def test_orders_longer_than_a_message(self, bench: Bench):
        spec = bench.spec("print")
        code = "import sys; print(len(sys.argv[1]))"
        spec = replace(spec, command=("python", "-c", code, "x" * 100_000))
        assert (await run(bench, spec))[1].stdout == b"100000\n"

    async def test_a_worker_has_no_rights(self, bench: Bench):
        executor = _wasm(bench)
        bench.lease = "lease"
        await run(bench, bench.spec("nothing"))
        pid = executor.worker_pid("lease")
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        if os.geteuid() == 0:
            assert status["Uid"].split() == [str(GUEST_UID)] * 4
            assert status["Groups"].strip() == ""
            assert int(status["CapEff"], 16) == 0
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")

    @pytest.mark.usefixtures("native_sandbox")
    async def test_a_part_of_a_core_is_throttled(self, tmp_path: Path, module_folder: Path):
        mark = f"lumaris-test{os.getpid()}-"
        executor = WasmExecutor.open(module_folder, mark=mark)
        bench = Bench(executor, tmp_path, lambda _: (PYTHON, ("python", "-c", CODE["spin"])))
        try:
            outcome, _ = await run(bench, bench.spec("spin", cpu_millis=200, wall_s=1))
            assert outcome.reason == "killed_deadline"
            assert outcome.usage.cpu_ms <= 500
        finally:
            await executor.aclose()
        assert await executor.reap_orphans() == 0

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
from lumaris_node.executors.wasm.executor import WasmExecutor
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


SCIENCE = CATALOG["python:3.15-science-wasi"].digest
SCIENCE_CODE = """
import numpy as np
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
b = np.arange(144.0).reshape(12, 12)
print((b @ b.T).sum(), (b @ b.T)[3].tolist())
x, y = make_classification(n_samples=300, n_features=6, random_state=7)
model = LogisticRegression(C=0.5, max_iter=200).fit(x, y)
print(model.score(x, y), [round(float(c), 4) for c in model.coef_[0]])
"""
# Printed by the same program on CPython 3.11 for x86-64, with numpy 2.4.6 and scikit-learn 1.9.1.
SCIENCE_NATIVE = b"""\
8854560.0 [2882.0, 8858.0, 14834.0, 20810.0, 26786.0, 32762.0, 38738.0, 44714.0, 50690.0, \
56666.0, 62642.0, 68618.0]
0.9966666666666667 [-0.2071, 0.6405, 2.3623, -1.5937, -1.1443, 0.0064]
"""


@pytest.mark.slow
@pytest.mark.planet
@pytest.mark.usefixtures("science_module")
async def test_science_gives_what_it_gives_natively(tmp_path: Path):
    executor = WasmExecutor.open(tmp_path / "modules")
    bench = Bench(executor, tmp_path, lambda _: (SCIENCE, ("python", "-c", SCIENCE_CODE)))
    said: list[tuple[str, int, int]] = []
    try:
        async with trio.open_nursery() as nursery:  # the second waits for the first's code
            nursery.start_soon(executor.compile, SCIENCE, lambda *told: said.append(told))
            nursery.start_soon(executor.compile, SCIENCE)
        assert ("compiling", 0, 0) in said
        assert len(list((tmp_path / "modules").glob("*.cwasm"))) == 1
        spec = bench.spec("science", memory_bytes=1024 * MIB, wall_s=300)
        log = Log()
        handle = await executor.prepare(spec)
        await executor.start(handle, log)
        outcome = await executor.wait(handle)
        await executor.destroy(handle)
    finally:
        await executor.aclose()
    assert (outcome.reason, log.stdout) == ("succeeded", SCIENCE_NATIVE), (outcome, log)
    assert outcome.usage.fuel > 0


async def test_a_large_module_needs_memory_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    executor = WasmExecutor.open(tmp_path / "modules")
    source = tmp_path / "large"
    source.write_bytes(b"\0asm" + bytes(modules.LARGE_BYTES))
    image = digest(source.read_bytes())
    await executor.add_image(image, source)
    monkeypatch.setattr(modules, "COMPILER_BYTES_EACH", 2**40)
    with pytest.raises(LumarisError) as caught:
        await executor.compile(image)
    assert caught.value.code == "memory_short"
    await executor.remove_image(image)
    assert not await executor.has_image(image)


def _wasm(bench: Bench) -> WasmExecutor:
    assert isinstance(bench.executor, WasmExecutor)
    return bench.executor


def _guest_bytes(pid: int) -> int:
    """Address space of guests that a worker holds: reservations of 4 GiB and their guards."""
    return int(psutil.Process(pid).memory_info().vms) // (4 * 1024 * MIB)


def test_a_module_under_a_false_digest_is_refused(tmp_path: Path):
    store = ModuleStore(tmp_path / "store")
    (tmp_path / "m").write_bytes(b"\0asm")
    with pytest.raises(LumarisError) as caught:
        store.add(tmp_path / "m", digest(b"other"))
    assert caught.value.code == "bad_image"
    assert list(store.directory.iterdir()) == []
    assert not store.has("../../etc/passwd")


async def test_a_refused_module_is_not_compiled_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, tries = ModuleStore(tmp_path), 0
    source = tmp_path / "given"
    source.write_bytes(b"\0asm, but no module")
    found = digest(source.read_bytes())
    store.add(source, found)

    async def refuse(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise LumarisError("bad_image", "refused")

    monkeypatch.setattr(store, "_compile", refuse)
    for _ in range(3):
        with pytest.raises(LumarisError, match="refused"):
            await store.compiled(found, "engine")
    assert tries == 1
