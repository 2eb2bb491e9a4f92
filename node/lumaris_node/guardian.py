"""A small process that outlives a killed node just long enough to end what must not outlive it.

It hangs on a pipe of the node's and does nothing until that closes. When the node closed it with a
word, it leaves; without one the node was killed, and the guardian ends the sandboxes and removes
the volumes. It holds a lock for as long as it lives: the next node begins only when the last one's
guardian has finished, so that it never touches what the next node made.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

# The whole clearing up. An engine that does not answer must not hold up the next node for longer.
_REAP_S: Final = 30
# How long a node waits for its guardian, and so for the last one's.
_START_S: Final = _REAP_S + 15
_GOOD_WORD: Final = b"done\n"
_READY: Final = b"ready\n"
_LOCK: Final = "guardian.lock"
_MARKS_BYTES_MAX: Final = 64 * 1024
REAP_VOLUMES: Final = "lumaris_node.guardian:reap_volumes"
REAP_CONTAINERS: Final = "lumaris_node.guardian:reap_containers"
REAP_GROUPS: Final = "lumaris_node.guardian:reap_groups"


class Guardian:
    """The node's hold on its guardian."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def aclose(self) -> None:
        """The node has cleared up itself: the guardian leaves without a deed. Idempotent."""
        import trio

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._dismiss)

    def _dismiss(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            if not pipe.closed:
                pipe.write(_GOOD_WORD)
                pipe.close()
        try:
            self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def start(state: Path, marks: tuple[str, ...] = (REAP_VOLUMES,), *, node: str) -> Guardian:
    """Start the guardian of the node with this state folder and peer id.

    `marks` name what it calls, in this order, when the node dies: functions `package.module:name`
    of the state folder and the peer id. Waits for the guardian of a node that was just killed.
    Raises LumarisError `platform_error`.
    """
    import trio

    from lumaris_protocol.errors import LumarisError

    process = await trio.to_thread.run_sync(_spawn)
    try:
        with trio.fail_after(_START_S):
            await trio.to_thread.run_sync(
                _greet, process, state, marks, node, abandon_on_cancel=True
            )
    except (OSError, trio.TooSlowError) as error:
        _discard(process)
        raise LumarisError("platform_error", f"The guardian did not start: {error}.") from error
    except BaseException:
        _discard(process)
        raise
    return Guardian(process)


def _discard(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()


def _spawn() -> subprocess.Popen[bytes]:
    # In a session of its own: an interrupt at the terminal is meant for the node.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lumaris_node.guardian"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _greet(
    process: subprocess.Popen[bytes], state: Path, marks: tuple[str, ...], node: str
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    hello = {"state": str(state.resolve()), "marks": marks, "node": node}
    process.stdin.write(json.dumps(hello).encode() + b"\n")
    process.stdin.flush()
    with process.stdout as answers:
        if answers.readline(len(_READY)) != _READY:
            raise OSError("it ended at once")


# --- inside the guardian ---


def main() -> None:
    """Wait for the node's end, and clear up after one that was killed."""
    # What ends a node from outside is often sent to all its processes; only the pipe counts here.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = sys.stdin.buffer
    try:
        hello = json.loads(pipe.readline(_MARKS_BYTES_MAX))
    except ValueError:
        return  # the node died before it said a word, and has made nothing
    state = Path(hello["state"])
    # Alone over this state folder, from now on until the process ends.
    lock = os.open(state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        os.write(sys.stdout.fileno(), _READY)
    except BrokenPipeError:
        return  # the node gave up waiting, and has made nothing
    if pipe.read(len(_GOOD_WORD)) != _GOOD_WORD:
        clear_up(state, tuple(hello["marks"]), hello["node"])


def clear_up(state: Path, marks: tuple[str, ...], node: str) -> None:
    """Call every mark's function; one that fails does not keep the next from its work."""
    signal.alarm(_REAP_S)  # it ends this process, whatever hangs; the next node reaps the rest
    logging.basicConfig(level=logging.WARNING)
    for mark in marks:
        try:
            count = _function(mark)(state, node)
            log.warning("reaped after the node's death mark=%s count=%d", mark, count)
        except Exception:
            log.exception("not reaped mark=%s", mark)


def _function(mark: str) -> Callable[[Path, str], int]:
    module, _, name = mark.partition(":")
    function: Callable[[Path, str], int] = getattr(importlib.import_module(module), name)
    return function


def reap_volumes(state: Path, _node: str) -> int:
    """Unmount and remove the node's volumes; how many there were."""
    from lumaris_node.workspace.volumes import reap

    return reap(state / "volumes")


def reap_groups(_state: Path, node: str) -> int:
    """Kill what is left in the node's control groups and remove them; how many there were."""
    from lumaris_node.sandbox.cgroups import Cgroups, CgroupsUnavailableError, mark_of

    try:
        return Cgroups().reap(mark_of(node))
    except CgroupsUnavailableError:
        return 0  # then the node has made none


def reap_containers(_state: Path, node: str) -> int:
    """Remove the node's containers; how many there were."""
    import trio

    from lumaris_node.executors.container.executor import ContainerExecutor
    from lumaris_protocol.keys import PeerId

    return trio.run(ContainerExecutor(PeerId(node)).reap_orphans)


if __name__ == "__main__":
    main()
