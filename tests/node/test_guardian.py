"""What becomes of a node's volumes when it is killed, and when it leaves in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lumaris_node import guardian
from lumaris_node.workspace.mounts import mounts_below
from lumaris_protocol.errors import LumarisError

# A program that lives like a node: a guardian, a volume, and then it waits to be killed.
PARENT = """
import sys, time
from pathlib import Path
import trio
from lumaris_node import guardian
from lumaris_node.workspace import Volumes
state = Path(sys.argv[1])
async def main():
    held = await guardian.start(state, node="peer")
    volumes = Volumes.open(state / "volumes")
    volume = volumes.volume("ses_" + "a" * 24, bytes_max=1 << 20, files_max=64)
    volume.open()
    (volume.path / "secret").write_bytes(b"secret")
    print(held.pid, volume.folder, flush=True)
    if sys.argv[2] == "stay":
        await trio.sleep_forever()
    await held.aclose()
    print("closed", flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


@contextlib.contextmanager
def parent(state: Path, what: str):
    """The program, its guardian's process and its volume's folder."""
    program = [sys.executable, "-c", PARENT, str(state), what]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, folder = process.stdout.readline().split()
        try:
            yield process, int(pid), Path(folder)
        finally:
            process.kill()


async def gone(pid: int) -> None:
    with trio.fail_after(30):
        while os.path.exists(f"/proc/{pid}"):
            await trio.sleep(0.01)


@pytest.mark.slow
async def test_a_killed_node_leaves_nothing(tmp_path: Path):
    with parent(tmp_path, "stay") as (process, pid, folder):
        assert folder.exists()
        os.kill(pid, signal.SIGTERM)  # what a terminal or a supervisor sends to all
        os.kill(process.pid, signal.SIGKILL)
        await gone(pid)
    assert not folder.exists()
    assert mounts_below(tmp_path) == []
    assert list((tmp_path / "volumes").iterdir()) == []


@pytest.mark.slow
async def test_the_next_node_waits_for_the_last_ones_guardian(tmp_path: Path):
    with parent(tmp_path, "stay") as (process, _, folder):
        process.kill()
        held = await guardian.start(tmp_path, node="peer")
        assert not folder.exists(), "cleared up before the next one began"
    await held.aclose()
    await held.aclose()
    await gone(held.pid)


@pytest.mark.slow
async def test_a_node_that_leaves_in_order_is_not_cleared_up_after(tmp_path: Path):
    with parent(tmp_path, "close") as (process, pid, folder):
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
        await gone(pid)
        assert folder.exists()
    held = await guardian.start(tmp_path, node="peer")
    await held.aclose()
    assert guardian.reap_volumes(tmp_path, "peer") == 1
    assert not folder.exists()


def test_one_mark_that_fails_does_not_keep_the_next(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(signal, "alarm", lambda _: 0)
    (tmp_path / "volumes" / ("ses_" + "b" * 24)).mkdir(parents=True)
    guardian.clear_up(tmp_path, ("no.such:thing", guardian.REAP_VOLUMES), "peer")
    assert list((tmp_path / "volumes").iterdir()) == []


@pytest.mark.slow
async def test_a_guardian_that_cannot_start_is_told(tmp_path: Path):
    with pytest.raises(LumarisError, match="platform_error"):
        await guardian.start(tmp_path / "none", node="peer")


@pytest.mark.slow
def test_it_is_small_until_it_is_needed():
    program = "import sys, lumaris_node.guardian; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"trio", "docker", "lumaris_node.workspace"} & set(loaded.stdout.split())
