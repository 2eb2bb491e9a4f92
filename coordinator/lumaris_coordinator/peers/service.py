"""The coordinator's own overlay: a trio thread beside the server's loop, and what it supervises.

Nothing that trades depends on it. It starts after the server does; when it cannot, or dies, that is
logged and tried again, and everything else goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import anyio.to_thread
import trio
import trio.from_thread

from lumaris_coordinator.bounds import (
    OVERLAY_CALL_S_MAX,
    OVERLAY_CALLS_MAX,
    OVERLAY_LONELY_S,
    OVERLAY_LOOK_S,
    OVERLAY_PEERS_WANTED,
    OVERLAY_RETRY_S_MAX,
    OVERLAY_RETRY_S_MIN,
    OVERLAY_SHUTDOWN_S_MAX,
)
from lumaris_coordinator.peers.guest import Guest
from lumaris_overlay.networks import ip_and_port
from lumaris_overlay.ports import AdvertEvent, Overlay
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.supervisor import OverlayConfig, run_overlay
from lumaris_overlay.tasks import first_of
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import PeerId

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

T = TypeVar("T")
OpenOverlay = Callable[[OverlayConfig], AbstractAsyncContextManager[Overlay]]
KEY_FILE: Final = "overlay.key"


def can_run() -> bool:
    """Whether the p2p extra is installed."""
    return find_spec("libp2p") is not None


class OverlayPeer:
    """The coordinator as a peer, while `run` runs.

    Raises LumarisError: `unsafe_key_file`, or `config_invalid` for where it is to listen.

    `bootstrap` gives the addresses of sellers; `current` the notices that hold now.
    """

    def __init__(
        self,
        context: Context,
        *,
        shards: Callable[[], bytes],
        heard: Callable[[AdvertEvent], None],
        alive: Callable[[], None],
        bootstrap: Callable[[], Awaitable[list[str]]],
        current: Callable[[], Awaitable[list[bytes]]],
        open_overlay: OpenOverlay = run_overlay,
    ) -> None:
        self._context, self._open_overlay = context, open_overlay
        self._alive, self._bootstrap, self._current = alive, bootstrap, current
        ip_and_port("overlay_listen", context.settings.overlay_listen)
        key = load_or_create_key(context.settings.state / KEY_FILE)
        self.peer_id = key.peer_id
        self._guest = Guest(context, key, shards=shards, heard=heard)
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._overlay: Overlay | None = None
        self._up = threading.Event()
        self._calls = anyio.CapacityLimiter(OVERLAY_CALLS_MAX)
        context.notices.listen(self._say)

    @property
    def connected(self) -> bool:
        """Whether the overlay process answers, as far as is known."""
        return self._overlay is not None

    async def run(self) -> None:
        """Be a peer until cancelled; the thread and its process end in `OVERLAY_SHUTDOWN_S_MAX`."""
        thread = threading.Thread(
            target=trio.run, args=(self._main,), name="lumaris-overlay", daemon=True
        )
        thread.start()
        try:
            await anyio.to_thread.run_sync(self._up.wait, OVERLAY_CALL_S_MAX)
            await self._keep_joined()
        finally:
            with anyio.CancelScope(shield=True):
                self._soon(self._stop)
                await anyio.to_thread.run_sync(thread.join, OVERLAY_SHUTDOWN_S_MAX)
            if thread.is_alive():
                log.error("the overlay thread does not end")

    async def call(self, work: Callable[[Overlay], Awaitable[T]]) -> T:
        """Run `work` in the overlay's thread, for `OVERLAY_CALL_S_MAX` at most.

        Raises what it raises, or LumarisError `overlay_failed` when there is no overlay and
        `timeout`.
        """
        token, overlay = self._token, self._overlay
        if token is None or overlay is None:
            raise LumarisError("overlay_failed", "The coordinator has no overlay now.")

        async def bounded() -> T:
            with trio.move_on_after(OVERLAY_CALL_S_MAX):
                return await work(overlay)
            raise LumarisError("timeout", "The overlay did not answer in time.")

        def wait() -> T:
            # Here, where a cancellation can only be that of the overlay's own loop.
            try:
                return trio.from_thread.run(bounded, trio_token=token)
            except (trio.RunFinishedError, trio.Cancelled):
                raise LumarisError("overlay_failed", "The coordinator's overlay ends.") from None

        return await anyio.to_thread.run_sync(wait, abandon_on_cancel=True, limiter=self._calls)

    # --- in the server's loop ---

    def _say(self, notice: bytes) -> None:
        self._soon(self._guest.say, notice)

    def _soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the overlay's thread call it; nothing happens when that has ended."""
        if self._token is not None:
            try:
                self._token.run_sync_soon(function, *arguments)
            except trio.RunFinishedError:
                log.debug("the overlay thread has ended")

    async def _keep_joined(self) -> None:
        """Say what holds already, then be connected to some of those who registered lately."""
        said = False
        while True:
            wait_s = OVERLAY_LONELY_S
            try:
                for notice in () if said else await self._current():
                    self._say(notice)
                said = True
                addresses = await self._bootstrap()
                if await self.call(partial(_join, addresses)) >= OVERLAY_PEERS_WANTED:
                    wait_s = OVERLAY_LOOK_S
                self._alive()
            except LumarisError as error:
                log.debug("overlay not joined code=%s", error.code)
            except Exception:
                log.exception("overlay not joined")
            await anyio.sleep(wait_s)

    # --- in the overlay's thread ---

    def _stop(self) -> None:
        assert self._scope is not None, "the token was there, so the scope is"
        self._scope.cancel()

    async def _main(self) -> None:
        with trio.CancelScope() as self._scope:
            self._token = trio.lowlevel.current_trio_token()
            self._up.set()
            delay_s = OVERLAY_RETRY_S_MIN
            while True:
                since = trio.current_time()
                try:
                    await self._attend()
                except Exception as error:  # whatever it is, the market goes on without
                    log.warning("overlay failed: %r", first_of(error))
                if trio.current_time() - since > OVERLAY_RETRY_S_MAX:
                    delay_s = OVERLAY_RETRY_S_MIN
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, OVERLAY_RETRY_S_MAX)

    async def _attend(self) -> None:
        async with self._open_overlay(self._config()) as overlay:
            self._overlay = overlay
            try:
                await self._guest.attend(overlay)
            finally:
                self._overlay = None

    def _config(self) -> OverlayConfig:
        context = self._context
        settings = context.settings
        return OverlayConfig(
            key_file=settings.state / KEY_FILE,
            network=settings.network,
            coordinator_keys=frozenset(map(PeerId, context.keys.peers())),
            state_dir=settings.state / "overlay",
            listen=settings.overlay_listen,
            roots=frozenset({context.keys.list.signer}),
        )


async def _join(addresses: list[str], overlay: Overlay) -> int:
    """Dial when too few are connected; how many are."""
    peers = len(await overlay.peers())
    if peers < OVERLAY_PEERS_WANTED and addresses:
        await overlay.connect(addresses)
        peers = len(await overlay.peers())
    return peers
