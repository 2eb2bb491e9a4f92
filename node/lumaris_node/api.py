"""The node's local socket: `lumaris node status`, `down`, `pause` and `resume` speak to it.

It belongs to the user who runs the node (mode 0600 in a 0700 folder), so it needs no password.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec
import trio

from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind

SOCKET_NAME: Final = "node.sock"
_CALL_S = 5
_SOCKET_PATH_MAX = 100  # the kernel allows 107 bytes

Status = Callable[[], Awaitable[dict[str, Any]]]
Call = Callable[[], Awaitable[dict[str, Any]]]


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    call: str


async def serve(
    path: Path,
    *,
    status: Status,
    stop: Callable[[], None],
    calls: Mapping[str, Call] = MappingProxyType({}),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer local calls until cancelled: `status`, `down`, and what `calls` names.

    Raises LumarisError `already_running`, `not_writable`.
    """
    await check_free(path)

    async def serve_call(stream: trio.SocketStream) -> None:
        framed = FramedStream(stream)
        try:
            with trio.move_on_after(_CALL_S):
                name = (await framed.expect_header(_Call)).call
                if name == "down":
                    await framed.send(Kind.HEADER, b"{}")
                    stop()
                    return
                answer = status if name == "status" else calls.get(name)
                if answer is None:
                    raise LumarisError("usage", f"This node knows no call {name[:80]!r}.")
                await framed.send(Kind.HEADER, msgspec.json.encode(await answer()))
        except LumarisError as error:
            await framed.refuse(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
        path.unlink(missing_ok=True)
        await sock.bind(str(path))
        path.chmod(0o600)
        sock.listen()
        try:
            task_status.started()
            await trio.serve_listeners(serve_call, [trio.SocketListener(sock)])
        finally:
            path.unlink(missing_ok=True)


async def check_free(path: Path) -> None:
    """Raises LumarisError `already_running`, or `config_invalid` for a path that is too long."""
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise LumarisError("config_invalid", f"The state directory's path is too long: {path}")
    if await _answers(path):
        raise LumarisError("already_running", f"A node already runs with {path.parent}.")


async def call(path: Path, name: str) -> dict[str, Any]:
    """Ask a running node. Raises LumarisError `not_running`."""
    try:
        with trio.fail_after(_CALL_S):
            stream = FramedStream(await trio.open_unix_socket(str(path)))
            try:
                await stream.send(Kind.HEADER, msgspec.json.encode(_Call(name)))
                return await stream.expect_header(dict)
            finally:
                await stream.aclose()
    except (OSError, trio.TooSlowError, trio.BrokenResourceError):
        raise LumarisError("not_running", f"No node answers at {path}.") from None


async def _answers(path: Path) -> bool:
    try:
        await call(path, "status")
    except LumarisError as error:
        return error.code != "not_running"  # a refusal comes from a node that runs
    return True
