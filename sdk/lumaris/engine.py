"""One background trio thread for each process: sync code, asyncio and trio all call into it.

Cancelling on the caller's side (Ctrl-C, an asyncio time-out, a trio scope) cancels the task in the
engine and waits until it has cleaned up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import sniffio
import trio

from lumaris_protocol.errors import LumarisError

T = TypeVar("T")

_START_S = 10


class Engine:
    """The thread. It starts on first use and again after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop: trio.Event | None = None

    def submit(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        on_end: Callable[[], object] = lambda: None,
        future: concurrent.futures.Future[T] | None = None,
    ) -> concurrent.futures.Future[T]:
        """Run `work` in the engine; cancelling the future cancels it there.

        `on_end` is called in the engine when the work has ended and cleaned up.
        """
        token = self._start()
        future = concurrent.futures.Future() if future is None else future
        scope = trio.CancelScope()
        cancelled = threading.Event()

        def on_done(done: concurrent.futures.Future[T]) -> None:
            if done.cancelled():
                cancelled.set()
                token.run_sync_soon(scope.cancel)

        async def task() -> None:
            with scope:
                try:
                    result = await work()
                except trio.Cancelled:
                    future.cancel()  # also when the engine itself ends: nobody waits for ever
                    raise
                except BaseException as error:
                    if not future.done():
                        future.set_exception(error)
                else:
                    if not future.done():
                        future.set_result(result)
            if scope.cancelled_caught:
                future.cancel()

        async def run() -> None:
            try:
                await task()
            finally:
                with contextlib.suppress(RuntimeError):  # the caller's loop is gone
                    on_end()

        future.add_done_callback(on_done)
        assert self._nursery is not None
        token.run_sync_soon(self._nursery.start_soon, run)
        return future

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` from sync code. Ctrl-C cancels it and waits for its clean-up."""
        if threading.current_thread() is self._thread:
            raise LumarisError("usage", "Use AsyncClient inside the engine; this call would block.")
        ended = threading.Event()
        self._start()
        # Made out here, so that a Ctrl-C in the middle of `submit` still finds what to cancel.
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            return self.submit(work, on_end=ended.set, future=future).result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(_START_S)
            raise

    async def call_async(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` from asyncio or trio."""
        if sniffio.current_async_library() == "asyncio":
            return await self._call_asyncio(work)
        ended, token = trio.Event(), trio.lowlevel.current_trio_token()
        future = self.submit(work, on_end=lambda: token.run_sync_soon(ended.set))
        try:
            await ended.wait()
        except trio.Cancelled:
            future.cancel()
            with trio.move_on_after(_START_S, shield=True):
                await ended.wait()
            raise
        return future.result()

    async def _call_asyncio(self, work: Callable[[], Awaitable[T]]) -> T:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        future = self.submit(work, on_end=lambda: loop.call_soon_threadsafe(ended.set))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # wrap_future has cancelled the work
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _START_S)
            raise

    def close(self) -> None:
        """Stop the thread and wait for it."""
        with self._lock:
            thread, token, stop = self._thread, self._token, self._stop
            self._thread = self._token = self._stop = self._nursery = None
        if thread is None or token is None or stop is None or self._pid != os.getpid():
            return
        token.run_sync_soon(stop.set)
        thread.join()

    def _start(self) -> trio.lowlevel.TrioToken:
        with self._lock:
            alive = self._thread is not None and self._thread.is_alive()
            if not alive or self._pid != os.getpid():
                ready = threading.Event()
                self._pid = os.getpid()
                self._thread = threading.Thread(
                    target=trio.run, args=(self._main, ready), daemon=True, name="lumaris-engine"
                )
                self._thread.start()
                if not ready.wait(_START_S):
                    raise LumarisError("internal", "The engine thread did not start.")
            assert self._token is not None
            return self._token

    async def _main(self, ready: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = stop = trio.Event()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            ready.set()
            await stop.wait()
            nursery.cancel_scope.cancel()
