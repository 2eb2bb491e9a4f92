"""The way to the Docker Engine: the one module that imports docker-py.

Ordinary calls go through docker-py in worker threads under a deadline. The streams of a guest are
opened here directly, because docker-py may lose what arrives right behind an answer's headers.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from lumaris_node.executors.port import Stream
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

# A call takes milliseconds; a machine under load may need many seconds for a start.
CALL_S_MAX = 60
# An engine that does not answer a ping within this is taken for absent.
PING_S_MAX = 1.5
# Calls in flight; each start costs the engine a quarter of a second of processor time.
_CALLS_MAX = 16
_RECEIVE_BYTES = 64 * limits.KIB
_HEAD_BYTES_MAX = 16 * limits.KIB
_FRAME_HEADER_BYTES = 8
T = TypeVar("T")


class Engine:
    """One Docker Engine of this machine, at `base_url` (unix://PATH), DOCKER_HOST or the usual."""

    def __init__(self, base_url: str | None = None) -> None:
        url = base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        self._url = url
        # An engine elsewhere could not mount this machine's folders.
        self._path = url.removeprefix("unix://") if url.startswith("unix://") else ""
        self._api: Any = None
        self._making = threading.Lock()
        self._limiter = trio.CapacityLimiter(_CALLS_MAX)
        self._ends = trio.CapacityLimiter(_CALLS_MAX)

    async def call(self, method: str, *arguments: Any, ending: bool = False, **named: Any) -> Any:
        """A method of docker-py's APIClient. Raises LumarisError `platform_error`, `timeout`.

        What ends a sandbox (`ending`) waits behind nothing else.
        """
        return await self.threaded(
            lambda api: getattr(api, method)(*arguments, **named), ending=ending
        )

    async def threaded(self, work: Callable[[Any], T], *, ending: bool = False) -> T:
        """Run a blocking function of the APIClient; its failures become LumarisError."""
        limiter = self._ends if ending else self._limiter
        try:
            return await trio.to_thread.run_sync(
                lambda: self._guarded(work), limiter=limiter, abandon_on_cancel=True
            )
        except ImportError as error:
            raise LumarisError("tier_unavailable", "docker-py is not installed.") from error

    async def answers(self) -> bool:
        """Whether an engine listens and answers now, over a connection of its own."""
        if not self._path:
            return False
        with trio.move_on_after(PING_S_MAX):
            try:
                async with await trio.open_unix_socket(self._path) as stream:
                    await stream.send_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
                    return b" 200 " in (await stream.receive_some(_HEAD_BYTES_MAX))[:16]
            except (OSError, trio.BrokenResourceError):
                return False
        return False

    async def open_exec(self, identity: str, *, tty: bool) -> GuestStream:
        """Start a created exec; its streams. Raises LumarisError `platform_error`."""
        path = f"/exec/{identity}/start"
        try:
            with trio.fail_after(CALL_S_MAX):
                stream, rest = await self._upgrade(path, {"Detach": False, "Tty": tty})
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            raise LumarisError("platform_error", f"The container engine: {error!r}") from error
        return GuestStream(stream, rest, tty=tty)

    async def _upgrade(self, path: str, body: dict[str, Any]) -> tuple[trio.SocketStream, bytes]:
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n"
            f"Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        stream = await trio.open_unix_socket(self._path)
        try:
            await stream.send_all(head.encode() + raw)
            got = b""
            while b"\r\n\r\n" not in got:
                more = await stream.receive_some(_HEAD_BYTES_MAX)
                if not more or len(got) > _HEAD_BYTES_MAX:
                    raise LumarisError("platform_error", "The container engine hung up.")
                got += more
            answer, rest = got.split(b"\r\n\r\n", 1)
            status = answer.split(b" ", 2)[1:2]
            if status not in ([b"101"], [b"200"]):
                why = rest[:400].decode("utf-8", "replace")
                raise LumarisError("platform_error", f"The container engine says: {why}")
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream, rest

    def close(self) -> None:
        """Drop the connections."""
        if self._api is not None:
            self._api.close()
            self._api = None

    def _client(self) -> Any:
        import docker

        if not self._path:
            raise OSError(f"{self._url} is not an engine of this machine")
        with socket.socket(socket.AF_UNIX) as trial:  # docker-py leaks one that cannot connect
            trial.settimeout(CALL_S_MAX)
            trial.connect(self._path)
        with self._making:
            if self._api is None:
                self._api = docker.APIClient(
                    base_url=self._url, version="auto", timeout=CALL_S_MAX, num_pools=_CALLS_MAX
                )
            return self._api

    def _guarded(self, work: Callable[[Any], T]) -> T:
        import docker.errors
        import requests.exceptions

        try:
            return work(self._client())
        except requests.exceptions.Timeout as error:
            raise LumarisError("timeout", "The container engine did not answer.") from error
        except requests.exceptions.ConnectionError as error:
            slow = "timed out" in str(error).lower()
            code = "timeout" if slow else "platform_error"
            raise LumarisError(code, "The container engine went away.") from error
        except docker.errors.APIError as error:
            why = str(error.explanation or error)[:400]
            raise LumarisError("platform_error", f"The container engine says: {why}") from error
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise LumarisError("platform_error", f"The container engine: {error}") from error
        except OSError as error:
            raise LumarisError("platform_error", f"No container engine: {error}") from error


class GuestStream:
    """A command's input and its outputs, as the engine carries them.

    Without a terminal the output comes in frames: a stream number, three zero bytes, a length, the
    bytes. A `receive` that is cancelled loses nothing.
    """

    def __init__(self, stream: trio.SocketStream, rest: bytes, *, tty: bool) -> None:
        self._stream, self._pending, self._tty = stream, bytearray(rest), tty
        self._name: Stream = "stdout"
        self._left = 0
        self._ended = False
        self._sending = trio.Lock()

    async def receive(self) -> tuple[Stream, bytes] | None:
        """The next output; None after the last."""
        while True:
            part = self._next()
            if part is not None:
                return part
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._pending += data

    async def send(self, data: bytes) -> None:
        """Bytes for the command's input. Raises LumarisError `not_attached`."""
        async with self._sending:
            if self._ended:
                raise LumarisError("not_attached", "The standard input has ended.")
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._ended = True
                raise LumarisError("not_attached", "The command has ended.") from error
            except trio.Cancelled:
                self._ended = True  # part of it may have been sent
                raise

    async def send_eof(self) -> None:
        """End the command's input."""
        async with self._sending:
            if not self._ended:
                self._ended = True
                try:
                    await self._stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return

    async def aclose(self) -> None:
        """Hang up; the command does not end by this."""
        self._ended = True
        await trio.aclose_forcefully(self._stream)

    def _next(self) -> tuple[Stream, bytes] | None:
        if self._tty:
            self._left = len(self._pending)
        while not self._left:
            if self._tty or len(self._pending) < _FRAME_HEADER_BYTES:
                return None
            self._name = "stderr" if self._pending[0] == 2 else "stdout"
            self._left = int.from_bytes(self._pending[4:8], "big")
            del self._pending[:_FRAME_HEADER_BYTES]
        part = bytes(self._pending[: self._left])
        if not part:
            return None
        del self._pending[: len(part)]
        self._left -= len(part)
        return self._name, part
