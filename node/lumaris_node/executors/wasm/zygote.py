"""The node's side of the wasm zygote: has it give out workers."""

from __future__ import annotations

from lumaris_node.executors.fork_server import ForkServer

STOP_S_MAX = 5
# What a worker takes in one message; a longer order comes in a file.
MESSAGE_BYTES_MAX = 32 * 1024
FOLDERS_MAX = 16
WORKER = "lumaris_node.executors.wasm.worker"


class ZygoteClient(ForkServer):
    """One zygote process. `uid` is the user of the guests, 0 for this process's own."""

    def __init__(self, uid: int) -> None:
        super().__init__(
            WORKER,
            str(uid),
            name="wasm worker",
            stop_s_max=STOP_S_MAX,
            # One worker thread is enough for a guest that has one thread.
            environment={"TOKIO_WORKER_THREADS": "1"},
        )

    async def take(self, lease: str, module: str, descriptors: tuple[int, ...]) -> None:
        """Give a lease a worker: the socket of its orders, its lifeline, a module's code.

        Raises LumarisError `tier_unavailable` without a zygote.
        """
        await self.call({"op": "take", "lease": lease, "module": module}, descriptors)

    async def signal_lease(self, lease: str, operation: str) -> None:
        """`kill`, `stop` or `cont` a lease's worker; one that is gone already is no error."""
        await self.tell({"op": operation, "lease": lease})
