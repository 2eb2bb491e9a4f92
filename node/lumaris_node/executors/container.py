"""The container tier: Docker Engine through docker-py, the one module that imports it.

Every call is made in a worker thread under a deadline. Guest output is read from an attach stream
opened before the start, with no log driver: the engine buffers at most about a megabyte for a
reader that lags, so a flood is held back by us and never fills a disk or runs through a log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import trio

from lumaris_node.executors.port import Handle, JobSpec, LogSink, Outcome, Stream, Usage
from lumaris_node.executors.supervise import (
    End,
    LogGate,
    RunClock,
    enforce_deadline,
    enforce_disk,
    enforce_log,
)
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Runtime

CALL_S_MAX = 60
PROBE_S_MAX = 30
WAIT_SLICE_S = 5
SAMPLE_S = 0.2
# Calls in flight; each start costs the engine a quarter of a second of processor time.
CALLS_MAX = 16
GUEST_UID = 10001
OPEN_FILES_MAX = 1024
TMP_BYTES_MAX = 64 * limits.MIB
TMP_FILES_MAX = 4096
# Only images the owner put under this name are offered: others on the machine may hold secrets.
OFFERED_PREFIX = "lumaris/"
LABEL_NODE, LABEL_JOB = "lumaris.node", "lumaris.job"
INIT_FAILED = b"[FATAL tini"
FRAME_HEADER_BYTES = 8
T = TypeVar("T")


@dataclass
class ContainerRun:
    """The private part of a handle."""

    container: str
    clock: RunClock = field(default_factory=RunClock)
    stream: trio.SocketStream | None = None
    gate: LogGate | None = None
    started: bool = False
    paused: bool = False
    reason: str = ""
    outcome: Outcome | None = None
    first_stderr: bytes = b""
    cpu_ms: int = 0
    memory_peak_bytes: int = 0


class ContainerExecutor:
    """The executor of tier `container`. `node` is this node's id; its label marks what is ours."""

    tier = "container"

    def __init__(self, node: str, *, base_url: str | None = None) -> None:
        self._node = node
        self._base_url = base_url
        self._api: Any = None
        self._limiter = trio.CapacityLimiter(CALLS_MAX)
        # Waiting for an end may take as long as a job; it must not hold up the calls that end one.
        self._waits = trio.CapacityLimiter(limits.SESSIONS_MAX)
        self._seccomp = ""

    async def probe(self) -> Runtime | None:
        """The engine's version if it answers; None without an engine or without docker-py."""
        try:
            with trio.fail_after(PROBE_S_MAX):
                version = await self._call("version")
                info = await self._call("info")
        except (LumarisError, trio.TooSlowError):
            return None
        if "seccomp" not in str(info.get("SecurityOptions", "")):
            return None  # our profile could not be applied
        userns = "userns" in str(info.get("SecurityOptions", ""))
        name = f"docker-{version.get('Version', '0')}"[: limits.NAME_CHARS_MAX].replace("~", "-")
        assurance = "container+userns" if userns else "container"
        return Runtime(tier="container", version=name, assurance=assurance)

    async def has_image(self, image: str) -> bool:
        """Whether an image offered here has exactly this id."""
        try:
            found = await self._call("inspect_image", image)
        except LumarisError:
            return False
        return bool(found.get("Id") == image and _offered(found))

    async def add_image(self, image: str, source: Path) -> None:
        """Refused: only the owner of this machine puts container images here."""
        raise LumarisError("bad_image", "Container images are not taken from buyers.")

    async def images(self) -> tuple[str, ...]:
        """Ids of the offered images, newest first."""
        try:
            found = await self._call("images")
        except LumarisError:
            return ()
        found = sorted(
            (item for item in found if _offered(item)), key=lambda item: -item["Created"]
        )
        return tuple(item["Id"] for item in found)

    async def prepare(self, spec: JobSpec) -> Handle:
        """Create the container. Raises `bad_image`, `bad_command`, `platform_error`."""
        if not spec.image.startswith("sha256:") or not await self.has_image(spec.image):
            raise LumarisError("bad_image", f"The image {spec.image[:80]} is not offered here.")
        image = await self._call("inspect_image", spec.image)
        if (image.get("Config") or {}).get("Volumes"):
            raise LumarisError("bad_image", "The image declares volumes, which have no size limit.")
        if not spec.command or any("\0" in text for text in spec.command):
            raise LumarisError("bad_command", "The command is empty or holds a zero byte.")
        made = await self._call("create_container_from_config", self._config(spec), None)
        return Handle(spec, {"run": ContainerRun(made["Id"])})

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Attach, then start. Raises `bad_command` when the engine cannot run the command."""
        run = _run(handle)
        run.gate = LogGate(log, handle.spec.limits.log_bytes)
        run.stream = await self._threaded(lambda: _attach(self._client(), run.container))
        try:
            await self._call("start", run.container)
        except LumarisError as error:
            text = error.message.lower()
            if any(sign in text for sign in ("executable file", "permission denied", "exec:")):
                raise LumarisError("bad_command", error.message) from error
            raise
        run.started = True
        run.clock.run()

    async def wait(self, handle: Handle) -> Outcome:
        """Until the container has ended and its output was passed on."""
        run, spec = _run(handle), handle.spec
        if run.outcome is not None:
            return run.outcome
        assert run.started, "wait before start"
        assert run.gate is not None
        end = self._ender(handle)
        try:
            async with trio.open_nursery() as watchers:
                watchers.start_soon(enforce_deadline, run.clock, spec.limits.wall_s, end)
                watchers.start_soon(enforce_log, run.gate, end)
                watchers.start_soon(enforce_disk, spec.outputs, spec.limits.disk_bytes, end)
                watchers.start_soon(self._sample, run)
                await _pump(run)
                status = await self._exit_status(run)
                run.clock.stop()
                watchers.cancel_scope.cancel()
            state = (await self._call("inspect_container", run.container)).get("State") or {}
            run.outcome = _judge(run, status, oom=bool(state.get("OOMKilled")))
        except* LumarisError as errors:
            run.clock.stop()
            run.outcome = Outcome(
                run.reason or "platform_error", None, _usage(run), str(errors.exceptions[0])
            )
        return run.outcome

    async def pause(self, handle: Handle) -> None:
        """Freeze the container; its wall clock stops."""
        run = _run(handle)
        if run.started and run.outcome is None and not run.paused:
            await self._call("pause", run.container)
            run.paused = True
            run.clock.stop()

    async def resume(self, handle: Handle) -> None:
        """Continue a frozen container."""
        run = _run(handle)
        if run.started and run.outcome is None and run.paused:
            await self._call("unpause", run.container)
            run.paused = False
            run.clock.run()

    async def cancel(self, handle: Handle, reason: str) -> None:
        """Kill the container; `wait` then returns an Outcome with this reason."""
        await self._end(handle, reason)

    async def destroy(self, handle: Handle) -> None:
        """Remove the container. An engine that is gone leaves it to the next reap."""
        run = _run(handle)
        with trio.CancelScope(shield=True):
            if run.stream is not None:
                await run.stream.aclose()
                run.stream = None
            run.clock.stop()
            if run.container:
                await self._remove(run.container)
                run.container = ""

    async def reap_orphans(self) -> int:
        """Remove every container with this node's label; call it before any job is prepared."""
        mark = {"label": f"{LABEL_NODE}={self._node}"}
        try:
            found = await self._call("containers", all=True, filters=mark)
        except LumarisError:
            return 0
        return sum([await self._remove(item["Id"]) for item in found])

    async def aclose(self) -> None:
        """Close the connections to the engine. Containers are removed by `destroy`."""
        if self._api is not None:
            self._api.close()
            self._api = None

    def _config(self, spec: JobSpec) -> dict[str, Any]:
        bounds = spec.limits
        if not self._seccomp:
            profile = resources.files("lumaris_node.executors").joinpath("seccomp.json")
            self._seccomp = json.dumps(json.loads(profile.read_text(encoding="utf-8")))
        root = os.geteuid() == 0
        uid, gid = (GUEST_UID, GUEST_UID) if root else (os.geteuid(), os.getegid())
        tmp = min(bounds.disk_bytes, TMP_BYTES_MAX)
        host = {
            "Binds": None,
            "Mounts": [
                _bind(str(spec.inputs), "/in", read_only=True),
                _bind(str(spec.outputs), "/out", read_only=False),
            ],
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges", f"seccomp={self._seccomp}"],
            "ReadonlyRootfs": True,
            "NetworkMode": "none",
            "IpcMode": "private",
            "PidsLimit": bounds.pids,
            "Memory": bounds.memory_bytes,
            "MemorySwap": bounds.memory_bytes,
            "NanoCpus": bounds.cpu_millis * 1_000_000,
            "Init": True,
            "Tmpfs": {
                "/tmp": f"size={tmp},nr_inodes={TMP_FILES_MAX},mode=1777,nosuid,nodev,noexec"  # noqa: S108 - the guest's own
            },
            "ShmSize": 16 * limits.MIB,
            "Ulimits": [
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": OPEN_FILES_MAX, "Hard": OPEN_FILES_MAX},
                _ulimit("fsize", min(bounds.disk_bytes, limits.FILE_BYTES_MAX)),
            ],
            "LogConfig": {"Type": "none", "Config": {}},
            "RestartPolicy": {"Name": "no"},
        }
        return {
            "Image": spec.image,
            "Entrypoint": [],
            "Cmd": list(spec.command),
            "Env": [f"{name}={value}" for name, value in sorted(spec.environment.items())],
            "User": f"{uid}:{gid}",
            "WorkingDir": "/out",
            "AttachStdout": True,
            "AttachStderr": True,
            "NetworkDisabled": True,
            "Healthcheck": {"Test": ["NONE"]},
            "Labels": {LABEL_NODE: self._node, LABEL_JOB: spec.job},
            "HostConfig": host,
        }

    def _ender(self, handle: Handle) -> End:
        async def end(reason: str) -> None:
            await self._end(handle, reason)

        return end

    async def _end(self, handle: Handle, reason: str) -> None:
        run = _run(handle)
        run.reason = run.reason or reason  # the first reason is the cause
        if not run.started or run.outcome is not None:
            return
        with contextlib.suppress(LumarisError):  # ended, or no engine
            if run.paused:
                await self._call("unpause", run.container)
                run.paused = False
            await self._call("kill", run.container)

    async def _exit_status(self, run: ContainerRun) -> int:
        """The engine's word that the container ended; a guest may close its streams long before."""
        while True:
            try:
                ended = await self._threaded(
                    lambda: self._client().wait(run.container, timeout=WAIT_SLICE_S), waits=True
                )
                return int(ended["StatusCode"])
            except LumarisError as error:
                if error.code != "timeout":
                    raise

    async def _sample(self, run: ContainerRun) -> None:
        while True:
            cpu_ms, peak = _cgroup_usage(run.container)
            run.cpu_ms = max(run.cpu_ms, cpu_ms)
            run.memory_peak_bytes = max(run.memory_peak_bytes, peak)
            await trio.sleep(SAMPLE_S)

    async def _remove(self, container: str) -> int:
        try:
            await self._call("remove_container", container, force=True, v=True)
        except LumarisError:
            return 0
        return 1

    def _client(self) -> Any:
        if self._api is None:
            import docker

            url = self._base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
            if url.startswith("unix://"):
                with socket.socket(socket.AF_UNIX) as trial:  # docker-py leaks one that fails
                    trial.settimeout(CALL_S_MAX)
                    trial.connect(url.removeprefix("unix://"))
            self._api = docker.APIClient(
                base_url=url, version="auto", timeout=CALL_S_MAX, num_pools=CALLS_MAX * 4
            )
        return self._api

    async def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        return await self._threaded(lambda: getattr(self._client(), method)(*arguments, **named))

    async def _threaded(self, work: Callable[[], T], *, waits: bool = False) -> T:
        """Run a blocking engine call; its failures become LumarisError."""

        def guarded() -> T:
            import docker.errors
            import requests.exceptions

            try:
                return work()
            except requests.exceptions.Timeout as error:
                raise LumarisError("timeout", "The container engine did not answer.") from error
            except requests.exceptions.ConnectionError as error:
                slow = "timed out" in str(error).lower()
                code = "timeout" if slow else "platform_error"
                raise LumarisError(code, "The container engine went away.") from error
            except docker.errors.APIError as error:
                why = str(error.explanation or error)[:400]
                raise LumarisError("platform_error", f"The container engine says: {why}") from error
            except (docker.errors.DockerException, OSError) as error:
                raise LumarisError("platform_error", f"No container engine: {error}") from error

        try:
            return await trio.to_thread.run_sync(
                guarded, limiter=self._waits if waits else self._limiter, abandon_on_cancel=True
            )
        except ImportError as error:
            raise LumarisError("tier_unavailable", "docker-py is not installed.") from error


def _attach(api: Any, container: str) -> trio.SocketStream:
    """The engine's stream of both outputs, opened before anything is sent."""
    raw = api.attach_socket(container, {"stdout": 1, "stderr": 1, "stream": 1})
    ours = socket.socket(fileno=os.dup(raw.fileno()))
    theirs = raw._sock  # noqa: SLF001 - docker-py leaves its own socket of a hijacked stream open
    raw._response.close()  # noqa: SLF001
    raw.close()
    theirs.close()
    ours.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours))


async def _pump(run: ContainerRun) -> None:
    """Frames of the attach stream: a stream number, three zero bytes, a length, the bytes."""
    stream, gate = run.stream, run.gate
    assert stream is not None
    assert gate is not None
    pending = bytearray()
    name: Stream = "stdout"
    left = 0
    while True:
        try:
            data = await stream.receive_some(64 * limits.KIB)
        except trio.BrokenResourceError:
            return
        if not data:
            return
        pending += data
        while pending:
            if left == 0:
                if len(pending) < FRAME_HEADER_BYTES:
                    break
                name = "stderr" if pending[0] == 2 else "stdout"
                left = int.from_bytes(pending[4:8], "big")
                del pending[:FRAME_HEADER_BYTES]
                continue
            part = bytes(pending[:left])
            del pending[:left]
            left -= len(part)
            if name == "stderr" and len(run.first_stderr) < len(INIT_FAILED):
                run.first_stderr += part[: len(INIT_FAILED)]
            await gate.put(name, part)


def _judge(run: ContainerRun, status: int, *, oom: bool) -> Outcome:
    usage = _usage(run)
    if run.reason:
        return Outcome(run.reason, None, usage)
    if oom:
        return Outcome("killed_memory", None, usage)
    if status in (126, 127) and run.first_stderr.startswith(INIT_FAILED):
        return Outcome("bad_command", None, usage, "The image has no such command.")
    if status == 0:
        return Outcome("succeeded", 0, usage)
    return Outcome("exit_nonzero", status, usage)


def _usage(run: ContainerRun) -> Usage:
    return Usage(int(run.clock.elapsed_s * 1000), run.cpu_ms, run.memory_peak_bytes)


def _cgroup_usage(container: str) -> tuple[int, int]:
    """CPU milliseconds and peak memory from the kernel, 0 where its files are not found."""
    root = "/sys/fs/cgroup"
    v2 = (f"{root}/docker/{container}", f"{root}/system.slice/docker-{container}.scope")
    cpu = _read_number(f"{root}/cpuacct/docker/{container}/cpuacct.usage") // 1_000_000
    peak = _read_number(f"{root}/memory/docker/{container}/memory.max_usage_in_bytes")
    for folder in v2:
        cpu = cpu or _read_number(f"{folder}/cpu.stat", "usage_usec ") // 1000
        peak = peak or _read_number(f"{folder}/memory.peak")
    return cpu, peak


def _read_number(path: str, key: str = "") -> int:
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.removeprefix(key))
    except (OSError, ValueError):
        return 0
    return 0


def _bind(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}


def _ulimit(name: str, value: int) -> dict[str, Any]:
    return {"Name": name, "Soft": value, "Hard": value}


def _offered(image: dict[str, Any]) -> bool:
    return any(tag.startswith(OFFERED_PREFIX) for tag in image.get("RepoTags") or ())


def _run(handle: Handle) -> ContainerRun:
    run = handle.private["run"]
    assert isinstance(run, ContainerRun)
    return run
