"""A whole trade between a seller and a buyer that sit behind different NATs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.overlay.nat import NatWorld, nat_world, need_namespaces

pytestmark = [pytest.mark.planet, pytest.mark.slow]

LUMARIS = (sys.executable, "-m", "lumaris.cli")
READY_S, JOB_S = 60, 120


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    need_namespaces()


@asynccontextmanager
async def running(world: NatWorld, name: str, log: Path, *arguments: str) -> AsyncGenerator[str]:
    """A long-running command in a namespace; its `ready` line. It is ended as a user would."""
    with log.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            world.command(name, (*LUMARIS, *arguments)), stdout=subprocess.PIPE, stderr=errors
        )
    assert process.stdout is not None
    try:
        line = b""
        with trio.fail_after(READY_S):
            while b"ready" not in line:
                data = await process.stdout.receive_some(4096)
                assert data, log.read_text()
                line += data
        yield line.decode()
    finally:
        process.send_signal(signal.SIGINT)
        with trio.CancelScope(shield=True), trio.move_on_after(30):
            await process.wait()
        if process.returncode is None:
            process.kill()
        await trio.aclose_forcefully(process.stdout)


class Trade:
    """The coordinator and a relay in the open, a seller behind one NAT, a buyer behind another."""

    def __init__(self, world: NatWorld, folder: Path, url: str) -> None:
        self.world, self.folder, self.url = world, folder, url

    async def ask(self, name: str, *arguments: str) -> Any:
        """What a command prints as JSON."""
        environment = {
            **os.environ,
            "LUMARIS_STATE": str(self.folder / "buyer"),
            "LUMARIS_COORDINATOR_URL": self.url,
            "LUMARIS_OVERLAY_LINGER_S": "20",
        }
        with trio.fail_after(JOB_S):
            done = await trio.run_process(
                self.world.command(name, (*LUMARIS, "--json", *arguments)),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment,
            )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return json.loads(done.stdout)

    async def node(self, name: str) -> Any:
        return await self.ask(name, "node", "status", "--state", str(self.folder / name))


@asynccontextmanager
async def trade(kind: Any, folder: Path) -> AsyncGenerator[Trade]:
    async with nat_world(kind) as world, AsyncExitStack() as stack:
        url = f"http://{world.ip('r')}:24480"

        async def start(name: str, log: str, *arguments: str) -> None:
            await stack.enter_async_context(running(world, name, folder / log, *arguments))

        await start(
            "r", "coordinator.log", "coordinator", "up",
            "--state", str(folder / "coordinator"), "--host", world.ip("r"), "--network", "nat",
        )  # fmt: skip
        for name, more in (("r", "[network]\nrelay_service = true\n"), ("s", ""), ("a", "")):
            state = folder / name
            state.mkdir(mode=0o700)
            (state / "node.toml").write_text(f'modules = "{folder / "modules"}"\n{more}')
            region = "home" if name == "a" else "open"
            await start(
                name, f"{name}.log", "node", "up", "--state", str(state),
                "--coordinator", url, "--listen", f"{world.ip(name)}:4001", "--region", region,
            )  # fmt: skip
        yield Trade(world, folder, url)


async def eventually(holds: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    with trio.fail_after(seconds):
        while not await holds():
            await trio.sleep(0.2)


@pytest.mark.parametrize("kind", ["preserving", "random"])
async def test_a_job_runs_between_two_nats(tmp_path, kind):
    async with trade(kind, tmp_path) as found:

        async def behind_a_relay() -> bool:
            reach = (await found.node("a"))["reach"]
            return reach["verdict"] == "private" and bool(reach["relays"])

        await eventually(behind_a_relay)
        await found.ask("b", "wallet", "deposit", "10")
        seller = (await found.node("a"))["peer"]
        for number in range(2):
            result = await found.ask(
                "b", "run", "--yes", "--region", "home", "python:3.12-wasi",
                "python", "-c", f"print({number} + 41)",
            )  # fmt: skip
            assert result["reason"] == "succeeded", result
            assert result["seller"] == seller
        ping = await found.ask("b", "ping", seller)
        if kind == "preserving":

            async def direct() -> bool:
                return bool((await found.ask("b", "ping", seller))["path"] == "direct")

            await eventually(direct)
        else:
            assert ping["path"] == "relayed"
        audit = await found.ask("b", "wallet", "show")
        assert int(audit["held_nanos"]) == 0
