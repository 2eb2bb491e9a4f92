"""What surrounds a lease's sandbox: the way out that its agreement allows, and its GPUs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

import trio

from lumaris_node.capability.meter import GpuMeter, GpuUse
from lumaris_node.egress import proxy
from lumaris_node.egress.policy import EgressPolicy, own_addresses
from lumaris_node.executors.port import Executor, Handle
from lumaris_node.sandbox import netns


class Surroundings:
    """Of one lease. `gpus` are the UUIDs that are its own; `egress` its agreement's rules."""

    def __init__(self, *, egress: tuple[str, ...] = (), gpus: tuple[str, ...] = ()) -> None:
        self.egress, self.gpus = egress, gpus
        self.gpu_use = GpuUse()
        self._policy = EgressPolicy(egress, own=own_addresses)

    @property
    def environment(self) -> dict[str, str]:
        """What a guest must be told of them."""
        return proxy.environment() if self.egress else {}

    def around(self, executor: Executor, handle: Handle) -> AbstractAsyncContextManager[None]:
        """Serve a prepared run until the block ends: its proxy, and the meter of its GPUs.

        Raises LumarisError when the sandbox's network cannot be entered.
        """
        if not self.egress and not self.gpus:
            return nullcontext()
        return self._around(executor, handle)

    @asynccontextmanager
    async def _around(self, executor: Executor, handle: Handle) -> AsyncGenerator[None]:
        listener: trio.SocketListener | None = None
        if self.egress:
            pid = await executor.network_pid(handle)
            listener = await netns.listen(pid, proxy.PORT)
        async with trio.open_nursery() as nursery:
            if listener is not None:
                nursery.start_soon(proxy.EgressProxy(self._policy).serve, listener)
            if self.gpus:
                meter = GpuMeter(self.gpus)
                self.gpu_use = meter.use
                nursery.start_soon(meter.run)
            yield
            nursery.cancel_scope.cancel()
