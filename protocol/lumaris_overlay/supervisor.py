"""Starts the overlay process, keeps it running, and hands out the client of its socket.

The node owns its process (`run_overlay`): it dies with the node and is restarted when it dies. A
buyer's is shared (`attach_or_spawn`): the first command starts it, later ones find it warm, and it
ends by itself some time after the last has left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from lumaris_overlay.private_files import make_private_folder
from lumaris_overlay.socket.client import SocketOverlay
from lumaris_overlay.tasks import background
from lumaris_protocol import codes
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

_READY_S = 30.0
_GRACE_S = 4.0
_PING_S = 2.0
_LOCK_S = 40.0
_POLL_S = 0.02
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 10.0
# A process that ran this long was sound: the next failure starts over with a short wait.
_SOUND_S = 30.0
_LINE_BYTES_MAX = 4_096
_LINGER_S_DEFAULT = 300.0


@dataclass(frozen=True)
class OverlayConfig:
    """What an overlay process is started with. Port 0 is chosen by the system, once."""

    key_file: Path
    network: str
    coordinator_keys: frozenset[PeerId]
    state_dir: Path
    listen: str = "127.0.0.1:0"
    bootstrap: tuple[str, ...] = ()
    linger_s: float = _LINGER_S_DEFAULT
    log_level: str = "warning"

    @property
    def socket(self) -> Path:
        """Where the process serves its port."""
        return self.state_dir / "overlay.sock"

    @property
    def log(self) -> Path:
        """Where the process writes what it logs."""
        return self.state_dir / "overlay.log"

    def command(self, *extra: str) -> list[str]:
        """The command that starts the process."""
        command = [sys.executable, "-m", "lumaris_overlay"]
        command += ["--key", str(self.key_file), "--network", self.network]
        command += ["--listen", self.listen, "--socket", str(self.socket)]
        command += ["--state", str(self.state_dir), "--log-level", self.log_level]
        for peer in sorted(self.coordinator_keys):
            command += ["--coordinator-key", peer]
        for address in self.bootstrap:
            command += ["--bootstrap", address]
        return [*command, *extra]


@asynccontextmanager
async def run_overlay(config: OverlayConfig) -> AsyncGenerator[SocketOverlay]:
    """An overlay process of our own, restarted when it dies, ended with the context.

    Raises LumarisError with the process's own code (`port_in_use`, `unsafe_key_file`, …) or
    `overlay_failed` when it does not come up the first time.
    """
    supervisor = OverlayProcess(config)
    async with background() as nursery:
        try:
            await nursery.start(supervisor.run)
            overlay = SocketOverlay(config.socket, nursery)
            await overlay.attach()
            yield overlay
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await supervisor.end()


class OverlayProcess:
    """One supervised overlay process."""

    def __init__(self, config: OverlayConfig) -> None:
        self._config = config
        self._process: trio.Process | None = None
        self._stopping = False
        self._listen = config.listen
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the process running until cancelled; started once it is ready the first time."""
        await self._start()
        task_status.started()
        delay = _BACKOFF_S_MIN
        while True:
            assert self._process is not None
            since = trio.current_time()
            status = await self._process.wait()
            logger.warning("overlay event=died status=%s", status)
            if trio.current_time() - since >= _SOUND_S:
                delay = _BACKOFF_S_MIN
            while True:
                await trio.sleep(delay)
                delay = min(delay * 2, _BACKOFF_S_MAX)
                try:
                    await self._start()
                    break
                except LumarisError as error:
                    logger.warning("overlay event=restart_failed code=%s", error.code)
                    self._listen = self._config.listen

    async def end(self) -> None:
        """End the process: asked first, then killed; its socket file is gone afterwards."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(_GRACE_S):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                await trio.aclose_forcefully(pipe)
        self._config.socket.unlink(missing_ok=True)

    async def _start(self) -> None:
        await self.end()
        self.starts += 1
        make_private_folder(self._config.state_dir)
        command = replace(self._config, listen=self._listen).command("--with-parent")
        with self._config.log.open("ab") as log:
            at = log.tell()
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is for the owner, who ends us
            )
        self._process = process
        assert process.stdout is not None
        line = b""
        try:
            with trio.fail_after(_READY_S):
                while b"\n" not in line and len(line) < _LINE_BYTES_MAX:
                    data = await process.stdout.receive_some(_LINE_BYTES_MAX)
                    if not data:
                        break
                    line += data
        except trio.TooSlowError:
            await self.end()
            raise LumarisError(
                "overlay_failed", f"It was not ready in {_READY_S:.0f} s; see {self._config.log}."
            ) from None
        if not line.startswith(b"ready "):
            await self.end()
            raise _why(self._config.log, at)
        # A port that the system chose is kept over restarts: others have been told of it.
        port = line.decode(errors="replace").partition("/tcp/")[2].partition("/")[0]
        self._listen = f"{self._config.listen.rpartition(':')[0]}:{port}"


@asynccontextmanager
async def attach_or_spawn(config: OverlayConfig) -> AsyncGenerator[SocketOverlay]:
    """The user's overlay process, started when none answers. It outlives this context.

    Raises LumarisError `config_invalid` when one runs for another network or other coordinators.
    """
    async with background() as nursery:
        overlay = SocketOverlay(config.socket, nursery)
        if not await _answers(overlay, config):
            async with _lock(config.state_dir / "overlay.lock"):
                if not await _answers(overlay, config):
                    await _spawn(config)
                    if not await _answers(overlay, config):
                        raise LumarisError("overlay_failed", "It started but does not answer.")
        await overlay.attach()
        yield overlay


async def _answers(overlay: SocketOverlay, config: OverlayConfig) -> bool:
    try:
        with trio.move_on_after(_PING_S):
            found = await overlay.ping()
            if found.network == config.network and (
                frozenset(found.coordinator_keys) == config.coordinator_keys
            ):
                return True
            raise LumarisError(
                "config_invalid",
                f"The running overlay is on network {found.network!r} or of other coordinators.",
                hint="Use another state directory for this network.",
            )
    except RemoteError:
        pass
    return False


async def _spawn(config: OverlayConfig) -> None:
    """Start a process that is nobody's child to end: it leaves by itself when idle."""
    make_private_folder(config.state_dir)
    command = config.command("--linger", str(config.linger_s))
    read_end, write_end = os.pipe()
    with config.log.open("ab") as log:
        at = log.tell()
        try:
            pid = _spawn_apart(command, stdout=write_end, stderr=log.fileno())
        finally:
            os.close(write_end)
    ready = trio.lowlevel.FdStream(read_end)
    started = False
    try:
        async with ready:
            with trio.move_on_after(_READY_S):
                started = (await ready.receive_some(_LINE_BYTES_MAX)).startswith(b"ready ")
    finally:
        if not started:
            _kill(pid)
    if not started:
        raise _why(config.log, at)


def _spawn_apart(command: list[str], *, stdout: int, stderr: int) -> int:
    """The pid of a process in its own session. It has no object here that expects to end it."""
    return os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, stdout, 1),
            (os.POSIX_SPAWN_DUP2, stderr, 2),
        ],
        setsid=True,
    )


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@asynccontextmanager
async def _lock(path: Path) -> AsyncGenerator[None]:
    make_private_folder(path.parent)
    with path.open("w") as file:
        try:
            with trio.fail_after(_LOCK_S):
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await trio.sleep(_POLL_S)
        except trio.TooSlowError:
            raise LumarisError("overlay_failed", "Another program is still starting it.") from None
        yield


def _why(log: Path, at: int) -> LumarisError:
    """The error line that the process left in its log after position `at`."""
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read(64 * 1024).decode(errors="replace").splitlines()
    for line in lines:
        word, _, rest = line.partition(" ")
        code, _, message = rest.partition(" ")
        if word == "error" and code in codes.CODES:
            return LumarisError(code, message)
    return LumarisError("overlay_failed", f"The overlay process did not start; see {log}.")
