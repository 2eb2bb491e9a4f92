"""Starts the overlay process, keeps it running, and hands out the client of its socket.

The node owns its process (`run_overlay`): it dies with the node and is restarted when it dies. A
buyer's is shared (`attach_or_spawn`): the first command starts it, later ones find it warm, those
that use it start it again when it dies, and it ends by itself some time after the last has left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lumaris_overlay import process_file
from lumaris_overlay.private_files import make_private_folder
from lumaris_overlay.process_file import ProcessFacts
from lumaris_overlay.socket import wire
from lumaris_overlay.socket.client import SocketOverlay
from lumaris_overlay.socket.wire import Reply, Request
from lumaris_overlay.tasks import background
from lumaris_protocol import codes
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import OVERLAY_MEMORY_BYTES

logger = logging.getLogger(__name__)

SOCKET_NAME = "overlay.sock"
_READY_S = 30.0
_GRACE_S = 4.0
_PING_S = 2.0
_LOCK_S = 40.0
_POLL_S = 0.02
# Looked at this often; so many looks in a row without an answer, and it is killed.
_LOOK_S, _MISSES_MAX = 10.0, 3
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 10.0
# A process that ran this long was sound: the next failure starts over with a short wait.
_SOUND_S = 30.0
_LINE_BYTES_MAX = 4_096
_LINGER_S_DEFAULT = 300.0


@dataclass(frozen=True)
class OverlayConfig:
    """What an overlay process is started with. Port 0 is chosen once and kept in the state."""

    key_file: Path
    network: str
    coordinator_keys: frozenset[PeerId]
    state_dir: Path
    listen: str = "127.0.0.1:0"
    bootstrap: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    relay_service: bool = False
    mdns: bool = False
    linger_s: float = _LINGER_S_DEFAULT
    memory_bytes_max: int = OVERLAY_MEMORY_BYTES
    log_level: str = "warning"
    # Whose lists of coordinator keys count.
    roots: frozenset[PeerId] = frozenset()

    @property
    def socket(self) -> Path:
        """Where the process serves its port."""
        return self.state_dir / SOCKET_NAME

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
        command += ["--memory-max", str(self.memory_bytes_max)]
        for peer in sorted(self.coordinator_keys):
            command += ["--coordinator-key", peer]
        for peer in sorted(self.roots):
            command += ["--coordinator-root", peer]
        for address in self.bootstrap:
            command += ["--bootstrap", address]
        for address in self.announce:
            command += ["--announce", address]
        command += ["--relay-service"] if self.relay_service else []
        command += ["--mdns"] if self.mdns else []
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
        self._serving = False
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
            async with background() as nursery:
                nursery.start_soon(self._kill_when_hung, self._process)
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
                except (LumarisError, OSError) as error:  # no memory for a process, say
                    logger.warning("overlay event=restart_failed error=%r", error)

    async def _kill_when_hung(self, process: trio.Process) -> None:
        """A process that lives and does not answer is as good as dead."""
        missed = 0
        while missed < _MISSES_MAX:
            await trio.sleep(_LOOK_S)
            answer = None
            with trio.move_on_after(_LOOK_S), suppress(LumarisError):
                answer = await identify(self._config.socket)
            missed = 0 if answer is not None else missed + 1
        logger.warning("overlay event=hung")
        process.kill()

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
        if self._serving:  # a process that did not come up may have met one that holds the socket
            self._config.socket.unlink(missing_ok=True)
        self._serving = False

    async def _start(self) -> None:
        await self.end()
        self.starts += 1
        make_private_folder(self._config.state_dir)
        command = self._config.command("--with-parent")
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
        try:
            with trio.move_on_after(_READY_S) as waited:
                self._serving = (await _first_line(process)).startswith(b"ready ")
        finally:
            if not self._serving:  # also when we are cancelled: nobody else knows of it
                with trio.CancelScope(shield=True):
                    await self.end()
        if waited.cancelled_caught:
            text = f"It was not ready in {_READY_S:.0f} s; see {self._config.log}."
            raise LumarisError("overlay_failed", text)
        if not self._serving:
            raise _why(self._config.log, at)


async def _first_line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while b"\n" not in line and len(line) < _LINE_BYTES_MAX:
        data = await process.stdout.receive_some(_LINE_BYTES_MAX)
        if not data:
            break
        line += data
    return line


@asynccontextmanager
async def attach_or_spawn(config: OverlayConfig) -> AsyncGenerator[SocketOverlay]:
    """The user's overlay process, started when none answers. It outlives this context.

    While the context lasts, a process that dies is started again.

    Raises LumarisError `config_invalid` when one runs for another network or other coordinators,
    or when another program holds the socket.
    """
    async with background() as nursery:
        shared = _SharedProcess(config)
        await shared.ensure()
        overlay = SocketOverlay(config.socket, nursery)
        await overlay.attach()
        nursery.start_soon(shared.keep)
        yield overlay


class _SharedProcess:
    """The overlay process of a user, as one of the programs that use it sees it."""

    def __init__(self, config: OverlayConfig) -> None:
        self._config = config
        self._child: int | None = None  # its pid, when this program started it

    async def ensure(self) -> None:
        """One runs, of our network; it is started when none answers. Raises LumarisError."""
        if await self._answers():
            return
        async with _lock(self._config.state_dir / "overlay.lock"):
            if await self._answers():
                return
            self._reap()
            try:
                self._child = await _spawn(self._config)
            except LumarisError as error:
                if error.code != "already_running":
                    raise
            # The one that runs already may only have been too busy to answer.
            if not await self._answers():
                raise LumarisError(
                    "overlay_failed",
                    "The overlay process runs but does not answer.",
                    hint="`lumaris daemon down` ends it; its log lies in the state directory.",
                )

    async def keep(self) -> None:
        """Start the process again whenever it dies, until cancelled."""
        delay = _BACKOFF_S_MIN
        while True:
            since = trio.current_time()
            await self._until_gone()
            self._reap()
            if trio.current_time() - since >= _SOUND_S:
                delay = _BACKOFF_S_MIN
            await trio.sleep(delay)
            delay = min(delay * 2, _BACKOFF_S_MAX)
            try:
                await self.ensure()
            except (LumarisError, OSError) as error:
                logger.warning("overlay event=restart_failed error=%r", error)

    async def _answers(self) -> bool:
        found = await identify(self._config.socket)
        if found is None:
            return False
        # One key in common is enough, or the root: the process learns of rotations from its
        # coordinator's list.
        config = self._config
        shared = config.roots.intersection(map(PeerId, found.roots))
        shared |= config.coordinator_keys.intersection(map(PeerId, found.coordinator_keys))
        if found.network == self._config.network and shared:
            return True
        raise LumarisError(
            "config_invalid",
            f"The running overlay is on network {found.network!r} or of other coordinators.",
            hint="Use another state directory for this network, or `lumaris daemon down` first.",
        )

    async def _until_gone(self) -> None:
        try:
            pipe = await trio.open_unix_socket(str(self._config.socket))
            async with pipe:
                await pipe.send_all(wire.encode(Request("attach")))
                while await pipe.receive_some():
                    pass
        except (OSError, trio.BrokenResourceError):
            return

    def _reap(self) -> None:
        """Leave no zombie of a process that this program started."""
        if self._child is not None:
            with suppress(ChildProcessError):
                os.waitpid(self._child, os.WNOHANG)
            self._child = None


async def identify(socket: Path) -> Reply | None:
    """Who serves a socket: its peer, network and coordinators. None when nobody answers.

    Raises LumarisError `config_invalid` when it is no overlay.
    """
    try:
        with trio.move_on_after(_PING_S):
            async with await trio.open_unix_socket(wire.socket_path(socket)) as pipe:
                await pipe.send_all(wire.encode(Request("attach")))
                return wire.decode_reply(await wire.reply_reader(pipe).next())
    except (FileNotFoundError, ConnectionRefusedError, trio.BrokenResourceError):
        return None
    except (OSError, EnvelopeError) as error:
        if isinstance(error, EnvelopeError) and error.code == "truncated":
            return None
        raise LumarisError("config_invalid", f"{socket} belongs to another program.") from error
    return None


async def end_shared(folder: Path) -> ProcessFacts | None:
    """End the overlay process of a state folder: asked first, then killed. The one that ended.

    Raises LumarisError `timeout` when it does not go.
    """
    socket = folder / SOCKET_NAME
    facts = process_file.holder(folder)
    if facts is None:
        await _remove_stale(socket)
        return None
    heard = b""
    with trio.move_on_after(_PING_S), suppress(OSError, trio.BrokenResourceError):
        async with await trio.open_unix_socket(wire.socket_path(socket)) as pipe:
            await pipe.send_all(wire.encode(Request("shutdown")))
            heard = await pipe.receive_some()
    if not heard or not await _gone(folder, facts):
        with suppress(ProcessLookupError):
            os.kill(facts.pid, signal.SIGKILL)
        if not await _gone(folder, facts):
            raise LumarisError("timeout", f"The overlay process {facts.pid} does not end.")
    await _remove_stale(socket)
    return facts


async def _gone(folder: Path, facts: ProcessFacts) -> bool:
    """Whether the process has left the folder, if need be to a successor, within the grace."""
    with trio.move_on_after(_GRACE_S):
        while facts.alive or (  # noqa: ASYNC110 - it is nobody's child here
            process_file.is_held(folder) and not process_file.holder(folder)
        ):
            await trio.sleep(_POLL_S)
        return True
    return False


async def _remove_stale(socket: Path) -> None:
    """Remove the file of a socket that nobody serves; a program's own is left alone."""
    if not socket.is_socket():
        return
    try:
        await (await trio.open_unix_socket(wire.socket_path(socket))).aclose()
    except ConnectionRefusedError:
        socket.unlink(missing_ok=True)
    except OSError:
        return


async def _spawn(config: OverlayConfig) -> int:
    """Start a process that is nobody's child to end: it leaves by itself when idle. Its pid."""
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
    return pid


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
