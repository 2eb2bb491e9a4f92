"""The tiers of this node: opened as its owner wants, offered once their self-test held.

A tier whose engine goes away leaves the offer within seconds, and comes back with it after another
self-test. What is offered is never more than what was seen to work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import trio
from msgspec import structs, to_builtins

from lumaris_node.config import NodeConfig
from lumaris_node.executors.container.executor import ContainerExecutor
from lumaris_node.executors.port import Executor
from lumaris_node.executors.process.executor import ProcessExecutor
from lumaris_node.executors.vm.executor import VmExecutor
from lumaris_node.executors.wasm.executor import WasmExecutor
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.sandbox.cgroups import mark_of
from lumaris_node.selftest.keep import Assurance
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import GIB
from lumaris_protocol.messages.advert import Feature, Runtime, Tier

log = logging.getLogger(__name__)

# How soon a tier that went away is missed, and one that came back is seen; a look at the engine
# costs a few milliseconds, one at a tier that runs something costs more.
_LOOK_S: Final[Mapping[Tier, float]] = {
    "container": 3.0,
    "wasm": 30.0,
    "process": 30.0,
    "vm": 300.0,
}
_PROBE_S: Final = 30.0
_ROOTFS_BYTES_MAX: Final = 64 * GIB


class Tiers:
    """Opens, tests and watches the executors. `runtimes` is what may be advertised now."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        make: Callable[[Tier], Executor],
        assurance: Assurance,
        gpus: bool = False,
    ) -> None:
        """`make` opens a tier's executor, in a thread; `gpus`: whether there are any for sale."""
        self._config, self._make, self._assurance, self._gpus = config, make, assurance, gpus
        self.executors: dict[Tier, Executor] = {}
        self.runtimes: tuple[Runtime, ...] = ()
        self._found: dict[Tier, Runtime] = {}
        self._why_not: dict[Tier, str] = {}  # of tiers that did not answer, or cannot be sold
        self._settled, self._again = trio.Event(), trio.Event()

    @property
    def wasm(self) -> WasmExecutor | None:
        """The executor of tier `wasm` for what only it can do, if its owner wants the tier."""
        executor = self.executors.get("wasm")
        return executor if isinstance(executor, WasmExecutor) else None

    def report(self) -> list[dict[str, Any]]:
        """Each wanted tier, for the owner: whether it is offered and for what, or why not."""
        return [self._record(tier) for tier in self.executors]

    def retest(self) -> None:
        """Attack every tier again now; what was seen before stands until then."""
        for tier in self.executors:
            self._assurance.retest(tier)
        self._again.set()
        self._again = trio.Event()

    async def open(self, stack: AsyncExitStack) -> None:
        """Make the executors; what a killed predecessor left of them is gone then.

        Raises LumarisError `tier_unavailable` when none of the wanted tiers can work here.
        """
        for tier in self._config.accept.runtimes:
            executor = await trio.to_thread.run_sync(self._make, tier)
            stack.push_async_callback(executor.aclose)
            self.executors[tier] = executor
            reaped = await executor.reap_orphans()
            if reaped:
                log.warning("reaped orphans tier=%s count=%d", tier, reaped)
        working = [tier for tier in self.executors if await self._look(tier, test=False)]
        for tier in self.executors.keys() - set(working):
            log.warning("tier not offered tier=%s why=%s", tier, self._why_not.get(tier))
        if not working:
            wanted = ", ".join(self.executors)
            raise LumarisError(
                "tier_unavailable", f"None of the tiers {wanted} works on this machine."
            )
        self._offer()

    async def watch(self, changed: Callable[[], None]) -> None:
        """Test what was not tested yet, then look at every tier for as long as the node sells.

        `changed` is called when what may be advertised has changed.
        """
        for tier in self.executors:  # in the owner's order: what comes first sells first
            await self._look(tier, test=True)
            if self._offer():
                changed()
            if self.runtimes:
                self._settled.set()
        self._settled.set()
        async with trio.open_nursery() as nursery:
            for tier in self.executors:
                nursery.start_soon(self._watch, tier, changed)

    async def settled(self) -> None:
        """Until a tier is offered. Raises LumarisError `tier_unavailable` when none will be."""
        await self._settled.wait()
        if not self.runtimes:
            raise LumarisError(
                "tier_unavailable",
                "No tier held off the attacks of its self-test.",
                hint="`lumaris node selftest` shows which of them succeeded.",
            )

    async def _watch(self, tier: Tier, changed: Callable[[], None]) -> None:
        while True:
            with trio.move_on_after(_LOOK_S[tier]):
                await self._again.wait()
            await self._look(tier, test=True)
            if self._offer():
                changed()

    async def _look(self, tier: Tier, *, test: bool) -> bool:
        """Probe a tier, and attack it when that is due and allowed now; whether it answered."""
        executor, runtime = self.executors[tier], None
        with trio.move_on_after(_PROBE_S):
            runtime = await executor.probe()
        why = why_not_sold(runtime, executor)
        if runtime is None or why:
            if self._found.pop(tier, None) is not None:
                log.warning("tier withdrawn tier=%s why=%s", tier, why)
            self._why_not[tier] = why
            self._assurance.lost(tier)
            return False
        self._why_not.pop(tier, None)
        with trio.move_on_after(_PROBE_S):
            left = await executor.reap_left()
            if left:
                log.warning("ended what was left tier=%s count=%d", tier, left)
        checked = (
            await self._assurance.check(executor, runtime)
            if test
            else self._assurance.standing(runtime)
        )
        if checked is None:
            self._found.pop(tier, None)
        else:
            self._found[tier] = self._trimmed(checked)
        return True

    def _record(self, tier: Tier) -> dict[str, Any]:
        runtime = self._found.get(tier)
        if runtime is not None:
            return {"offered": True, "why_not": "", **to_builtins(runtime)}
        why = self._why_not.get(tier) or self._assurance.why_not(tier)
        return {"tier": tier, "offered": False, "why_not": why}

    def _trimmed(self, runtime: Runtime) -> Runtime:
        """Without the features that the owner or this machine does not allow."""
        missing: set[Feature] = set()
        if not self._config.accept.egress:
            missing.add("egress")
        if not self._gpus:
            missing.add("gpu")
        kept = tuple(name for name in runtime.features if name not in missing)
        return structs.replace(runtime, features=kept)

    def _offer(self) -> bool:
        """Whether what may be advertised has changed."""
        before, self.runtimes = (
            self.runtimes,
            tuple(self._found[tier] for tier in self.executors if tier in self._found),
        )
        return before != self.runtimes


def why_not_sold(runtime: Runtime | None, executor: Executor) -> str:
    """Why what a probe found may not be offered, whatever its self-test says; "" if it may."""
    if runtime is None:
        return executor.why_not or f"Its probe took over {_PROBE_S:.0f} s."
    if runtime.assurance == "vm-emulated":
        # It would sell a tenth of a processor as a whole one.
        return "Without KVM its machines are emulated, which is too slow to be sold."
    return ""


def make_executor(tier: Tier, state: Path, config: NodeConfig, node: str) -> Executor:
    """The executor of a tier as the owner set it up. Blocks. Its probe says whether it works."""
    if tier == "wasm":
        return WasmExecutor.open(Path(config.modules or state / "wasm"), mark=mark_of(node))
    if tier == "container":
        return ContainerExecutor(node, folder=state / "container")
    rootfs = RootfsStore(state / "rootfs" / tier, bytes_max=_ROOTFS_BYTES_MAX)
    if tier == "process":
        return ProcessExecutor(node, rootfs)
    kernel = Path(config.vm.kernel) if config.vm.kernel else None
    return VmExecutor(rootfs, kernel=kernel, directory=state / "vm", node=node)
