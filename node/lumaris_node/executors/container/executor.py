"""The container tier: orders run by exec in hardened containers of a Docker Engine.

A lease has one container, started in `prepare` and idle between its orders; an order without a
lease has one of its own. The engine starts things and carries their output. Ends, limits and facts
come from the kernel (pidfds, control groups), so that they hold when the engine does not answer.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import trio

from lumaris_node.executors.container.config import LABEL_NODE, container_request
from lumaris_node.executors.container.engine import Engine
from lumaris_node.executors.container.idle import write_idle_program
from lumaris_node.executors.container.images import (
    CACHE_BYTES_MAX,
    ImageCache,
    is_offered,
    offered_image,
    remove_image,
)
from lumaris_node.executors.container.run import Command, ContainerAttachment, Run
from lumaris_node.executors.container.runtime import (
    Isolation,
    candidates,
    gpus_possible,
    trial_image,
)
from lumaris_node.executors.container.sandbox import (
    Sandbox,
    folder_identity,
    remove_container,
)
from lumaris_node.executors.port import (
    Handle,
    JobLimits,
    JobSpec,
    LogSink,
    Outcome,
    Progress,
    Usage,
)
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Feature, Runtime

log = logging.getLogger(__name__)
_PROBE_S_MAX = 30
# More starts at once make each slower and all together no faster.
_STARTS_MAX = max(2, 2 * (os.cpu_count() or 1))
# The engine passes a command on in one JSON document, and the kernel bounds what exec takes.
_COMMAND_BYTES_MAX = 128 * limits.KIB
_TRIAL_LIMITS = JobLimits(1000, 64 * limits.MIB, limits.MIB, 10, 0, 1024, 0, 0, pids=32)


class ContainerExecutor:
    """The executor of tier `container`. `node` is this node's id; its label marks what is ours.

    `runtime` names the engine's runtime to use; "" takes the strongest that passes a trial.
    `folder` holds a small program that containers mount; by default it is a temporary one.
    """

    tier = "container"
    why_not = ""

    def __init__(
        self,
        node: str,
        *,
        base_url: str | None = None,
        runtime: str = "",
        folder: Path | None = None,
        cache_bytes_max: int = CACHE_BYTES_MAX,
    ) -> None:
        self._node, self._wanted = node, runtime
        self._engine = Engine(base_url)
        self._cache = ImageCache(self._engine, bytes_max=cache_bytes_max)
        self._folder, self._folder_is_ours = folder, folder is None
        self._idle: dict[bool, Path] = {}
        self._starts = trio.CapacityLimiter(_STARTS_MAX)
        self._choosing = trio.Lock()
        self._tried: tuple[object, ...] = ()
        self._isolation: Isolation | None = None
        self._warm: dict[str, Sandbox] = {}  # by lease
        self._live: dict[str, Sandbox] = {}  # all, by container
        self._making, self._left = 0, False  # being created; whether one may be there for nobody

    async def probe(self) -> Runtime | None:
        """The engine's version and the isolation that a trial run had; None without an engine."""
        if not await self._engine.answers():
            self.why_not = "No container engine answers."
            return None
        try:
            with trio.fail_after(_PROBE_S_MAX):
                version = await self._engine.call("version")
                info = await self._engine.call("info")
                isolation = await self._choose(info)
        except (LumarisError, trio.TooSlowError) as error:
            self.why_not = str(error) or f"The engine took over {_PROBE_S_MAX} s."
            return None
        self.why_not = ""
        name = f"docker-{version.get('Version', '0')}"[: limits.NAME_CHARS_MAX].replace("~", "-")
        features: list[Feature] = ["stdin", "exec"]
        if isolation.native:
            features += ["egress", "forward", "warm"]
        if gpus_possible(info):
            features.append("gpu")
        return Runtime(
            tier="container",
            version=name,
            assurance=isolation.assurance,
            features=tuple(sorted(features)),
        )

    async def has_image(self, image: str) -> bool:
        """Whether an image offered here has exactly this id."""
        return await offered_image(self._engine, image) is not None

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        """Load an image from an archive, dropping what was used longest ago where room is short.

        Raises LumarisError `bad_image`, `unsafe_archive`, `disk_short`.
        """
        await self._cache.add(image, source, progress)

    async def images(self) -> tuple[str, ...]:
        """Ids of the offered images, newest first."""
        try:
            found = await self._engine.call("images")
        except LumarisError:
            return ()
        found = sorted((item for item in found if is_offered(item)), key=lambda x: -x["Created"])
        return tuple(item["Id"] for item in found)

    async def remove_image(self, image: str) -> None:
        """Forget an image that was taken in here; what the owner put here stays."""
        await remove_image(self._engine, image)

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        """Have a sandbox ready. Raises `bad_image`, `bad_command`, `platform_error`."""
        _check_command(spec.command)
        image = await offered_image(self._engine, spec.image)
        if image is None:
            raise LumarisError("bad_image", f"The image {spec.image[:80]} is not offered here.")
        self._cache.touch(spec.image)
        if (image.get("Config") or {}).get("Volumes"):
            raise LumarisError("bad_image", "The image declares volumes, which have no size limit.")
        if progress is not None:
            progress("starting", 0, 0)
        sandbox = await self._sandbox(spec)
        sandbox.busy = True
        return Handle(spec, {"run": Run(self._engine, spec, sandbox)})

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Begin the command. Raises `bad_command`, `platform_error`."""
        await _run(handle).start(log)

    async def wait(self, handle: Handle) -> Outcome:
        """Until the command has ended and its output was passed on."""
        return await _run(handle).wait()

    async def usage(self, handle: Handle) -> Usage:
        """What the run consumed so far, from the kernel."""
        run = _run(handle)
        if run.command is not None and run.outcome is None:
            run.sample()
        return run.usage()

    async def pause(self, handle: Handle) -> None:
        """Freeze the sandbox; the wall clock stops."""
        run = _run(handle)
        if run.command is not None and run.outcome is None and not run.sandbox.paused:
            await self._engine.call("pause", run.sandbox.container)
            run.sandbox.paused = True
            run.clock.stop()

    async def resume(self, handle: Handle) -> None:
        """Continue a frozen sandbox."""
        run = _run(handle)
        if run.command is not None and run.outcome is None and run.sandbox.paused:
            await self._engine.call("unpause", run.sandbox.container)
            run.sandbox.paused = False
            run.clock.run()

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        """Kill the command, or ask it to end first; `wait` then returns this reason."""
        await _run(handle).cancel(reason, grace_s)

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        """Bytes for its standard input, b"" to end it. Raises LumarisError `not_attached`."""
        run = _run(handle)
        if run.command is None or run.outcome is not None or not run.spec.stdin:
            raise LumarisError("not_attached", "The order has no open standard input.")
        if data:
            await run.command.stream.send(data)
        else:
            await run.command.stream.send_eof()

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> ContainerAttachment:
        """Run another command beside the job's. Raises `not_attached`, `bad_command`."""
        _check_command(command)
        return await _run(handle).attach(command, tty=tty, rows=rows, columns=columns)

    async def network_pid(self, handle: Handle) -> int:
        """The idle process of the sandbox, which has a network namespace of its own."""
        sandbox = _run(handle).sandbox
        if not sandbox.native or sandbox.group is None:
            raise LumarisError("not_supported", "This runtime keeps its network to itself.")
        if sandbox.pid not in sandbox.group.processes():
            raise LumarisError("not_attached", "The sandbox has ended.")
        return sandbox.pid

    async def destroy(self, handle: Handle) -> None:
        """End the order; a sandbox that is proven clean stays for the lease, another goes.

        Raises LumarisError `platform_error` while a process of it may live.
        """
        run = _run(handle)
        if run.destroyed:
            return
        with trio.CancelScope(shield=True):
            await run.aclose()
            sandbox, lease = run.sandbox, run.spec.lease
            # A command that is still being started would begin in what was found clean.
            warm = self._warm.get(lease) is sandbox and not run.attaching
            kept = warm and await sandbox.clean(self._engine)
            sandbox.busy = False
            if not kept:
                await self._end(lease, sandbox)
            run.destroyed = True

    async def release(self, lease: str) -> None:
        """Remove the sandbox of a lease."""
        sandbox = self._warm.get(lease)
        if sandbox is not None:
            await self._end(lease, sandbox)

    async def reap_orphans(self) -> int:
        """Remove every container with this node's label; call it before any job is prepared."""
        mark = {"label": f"{LABEL_NODE}={self._node}"}
        try:
            found = await self._engine.call("containers", all=True, filters=mark)
        except LumarisError:
            return 0
        return sum([await remove_container(self._engine, item["Id"]) for item in found])

    async def reap_left(self) -> int:
        """Remove containers with this node's label that no sandbox of ours is any more."""
        if not self._left or self._making:  # one that is being made is not known by its id yet
            return 0
        mark = {"label": f"{LABEL_NODE}={self._node}"}
        try:
            found = await self._engine.call("containers", all=True, filters=mark)
        except LumarisError:
            return 0
        strays = [item["Id"] for item in found if item["Id"] not in self._live]
        removed = [await remove_container(self._engine, stray) for stray in strays]
        self._left = not all(removed)
        return sum(removed)

    async def aclose(self) -> None:
        """Remove every sandbox and close the connections."""
        with trio.CancelScope(shield=True):
            for sandbox in list(self._live.values()):
                try:
                    await self._end("", sandbox)
                except LumarisError as error:  # the others end all the same
                    log.warning("a sandbox is left: %s: %s", sandbox.container, error)
            self._warm.clear()
            self._engine.close()
            if self._folder_is_ours and self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder, self._idle = None, {}

    async def _sandbox(self, spec: JobSpec) -> Sandbox:
        """The lease's sandbox if it fits, else a new one."""
        isolation = await self._known_isolation()
        request = container_request(
            spec, self._idle_program(isolation), node=self._node, runtime=isolation.runtime
        )
        folders = folder_identity(spec.inputs, spec.outputs)
        warm = self._warm.get(spec.lease)
        if warm is not None and not warm.busy:
            if warm.alive() and warm.request == request and warm.folders == folders:
                return warm
            await self._end(spec.lease, warm)
            warm = None
        fresh = Sandbox("", request, folders, native=isolation.native)
        await self._begin(fresh)
        if spec.lease and warm is None:
            self._warm[spec.lease] = fresh
        return fresh

    async def _begin(self, sandbox: Sandbox) -> None:
        """Create and start it; nothing is left of one that fails."""
        async with self._starts:
            with trio.CancelScope(shield=True):  # else one could be made that nobody knows
                await self._create(sandbox)
            try:
                await self._engine.call("start", sandbox.container)
                facts: dict[str, Any] = await self._engine.call(
                    "inspect_container", sandbox.container
                )
                sandbox.watch(int((facts.get("State") or {}).get("Pid") or 0))
                sandbox.make_ready()
            except BaseException:
                await self._end("", sandbox)
                raise

    async def _create(self, sandbox: Sandbox) -> None:
        self._making += 1
        try:
            made = await self._engine.call("create_container_from_config", sandbox.request, None)
            sandbox.container = str(made["Id"])
            self._live[sandbox.container] = sandbox
        except LumarisError:
            self._left = True  # it may be made all the same
            raise
        finally:
            self._making -= 1

    async def _end(self, lease: str, sandbox: Sandbox) -> None:
        if self._warm.get(lease) is sandbox:
            del self._warm[lease]
        self._live.pop(sandbox.container, None)
        if not await sandbox.end(self._engine):
            self._left = True
            log.warning("a container is left until the engine answers: %s", sandbox.container)

    async def _known_isolation(self) -> Isolation:
        if self._isolation is None:
            return await self._choose(await self._engine.call("info"))
        return self._isolation

    async def _choose(self, info: dict[str, Any]) -> Isolation:
        """The first runtime that runs something; tried again only when the engine changed."""
        key = tuple(str(info.get(name)) for name in ("ID", "ServerVersion", "Runtimes"))
        async with self._choosing:
            if self._isolation is not None and self._tried == key:
                return self._isolation
            self._isolation = None
            for isolation in candidates(info, self._wanted):
                try:
                    await self._try(isolation)
                except LumarisError as error:
                    log.warning("runtime %r does not work: %s", isolation.runtime, error)
                else:
                    self._isolation, self._tried = isolation, key
                    return isolation
        raise LumarisError("tier_unavailable", "No runtime of the container engine works.")

    async def _try(self, isolation: Isolation) -> None:
        """Run something as an order would be. Raises LumarisError `platform_error`."""
        program = self._idle_program(isolation)
        image = await trial_image(self._engine)
        for name in ("in", "out"):
            (program.parent / name).mkdir(exist_ok=True)
        inputs, outputs = program.parent / "in", program.parent / "out"
        spec = JobSpec("", image, ("/.lumaris/idle", "x"), {}, inputs, outputs, _TRIAL_LIMITS)
        request = container_request(spec, program, node=self._node, runtime=isolation.runtime)
        sandbox = Sandbox("", request, (), native=isolation.native)
        await self._begin(sandbox)
        try:
            command = await Command.begin(self._engine, sandbox, spec.command, {}, stdin=False)
            try:
                if await command.exit_status() != 0:
                    raise LumarisError("platform_error", "A trial run failed.")
            finally:
                await command.aclose()
            if isolation.native and not await sandbox.clean(self._engine):
                raise LumarisError("platform_error", "A sandbox cannot be seen to be clean.")
        finally:
            await self._end("", sandbox)

    def _idle_program(self, isolation: Isolation) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lumaris-container-"))
        readable = not isolation.native
        if readable not in self._idle:
            program = write_idle_program(self._folder, readable=readable)
            if program is None:
                raise LumarisError("tier_unavailable", "This processor is not supported.")
            self._idle[readable] = program
        return self._idle[readable]


def _check_command(command: tuple[str, ...]) -> None:
    if not command or not command[0] or any("\0" in text for text in command):
        raise LumarisError("bad_command", "The command is empty or holds a zero byte.")
    if sum(len(text.encode("utf-8", "surrogateescape")) for text in command) > _COMMAND_BYTES_MAX:
        raise LumarisError("bad_command", "The command is too long.")


def _run(handle: Handle) -> Run:
    run = handle.private["run"]
    assert isinstance(run, Run)
    return run
