"""A tier that runs nothing: the test is the guest. For what stands around a running order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from lumaris_node.executors.port import Handle, JobSpec, LogSink, Outcome, Progress, Stream, Usage
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Feature, Runtime
from tests.market import WAIT_S, SmallNode

USAGE = Usage(wall_ms=7, cpu_ms=1_234, memory_peak_bytes=5 << 20, fuel=42)


@dataclass
class Guest:
    """One run, as the test plays it."""

    spec: JobSpec
    log: LogSink
    ended: trio.Event = field(default_factory=trio.Event)
    reason: str = "succeeded"
    frozen: bool = False
    freezes: int = 0
    graces: list[float] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    stdin: list[bytes] = field(default_factory=list)
    stdin_ended: trio.Event = field(default_factory=trio.Event)
    hungry: trio.Event = field(default_factory=trio.Event)  # reads its input once this is set

    async def say(self, data: bytes, stream: Stream = "stdout") -> None:
        await self.log(stream, data)

    def end(self, reason: str = "succeeded") -> None:
        self.reason = reason
        self.ended.set()


class Command:
    """A command in the sandbox that repeats what it hears and ends with its input, status 7."""

    def __init__(self, words: tuple[str, ...], *, tty: bool, rows: int, columns: int) -> None:
        self.words, self.tty = words, tty
        self.sizes = [(rows, columns)]
        self.closed = trio.Event()
        self._heard, self._said = trio.open_memory_channel[bytes](8)

    async def send(self, data: bytes) -> None:
        await self._heard.send(data)

    async def send_eof(self) -> None:
        self._heard.close()

    async def receive(self) -> tuple[Stream, bytes] | None:
        try:
            return ("stdout" if self.tty else "stderr"), await self._said.receive()
        except trio.EndOfChannel:
            return None

    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    async def exit_status(self) -> int:
        return 7

    async def aclose(self) -> None:
        self.closed.set()


class Puppet:
    """Implements the executor port."""

    tier = "wasm"
    why_not = ""

    def __init__(self) -> None:
        self.released: list[str] = []
        self._sender, self._guests = trio.open_memory_channel[Guest](8)

    async def guest(self) -> Guest:
        """The next run that starts."""
        with trio.fail_after(WAIT_S):
            return await self._guests.receive()

    async def probe(self) -> Runtime | None:
        features: tuple[Feature, ...] = ("exec", "forward", "stdin")
        return Runtime(tier="wasm", version="puppet", assurance="none", features=features)

    async def has_image(self, image: str) -> bool:
        return True

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        raise AssertionError("every image is here")

    async def images(self) -> tuple[str, ...]:
        return ()

    async def remove_image(self, image: str) -> None:
        return

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        return Handle(spec)

    async def start(self, handle: Handle, log: LogSink) -> None:
        guest = Guest(handle.spec, log)
        handle.private["guest"] = guest
        await self._sender.send(guest)

    async def wait(self, handle: Handle) -> Outcome:
        guest = _guest(handle)
        await guest.ended.wait()
        return Outcome(guest.reason, 0 if guest.reason == "succeeded" else None, USAGE)

    async def usage(self, handle: Handle) -> Usage:
        return USAGE

    async def pause(self, handle: Handle) -> None:
        guest = _guest(handle)
        guest.frozen, guest.freezes = True, guest.freezes + 1

    async def resume(self, handle: Handle) -> None:
        _guest(handle).frozen = False

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        guest = _guest(handle)
        guest.graces.append(grace_s)
        guest.end(reason)

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        guest = _guest(handle)
        await guest.hungry.wait()
        guest.stdin.append(data)
        if not data:
            guest.stdin_ended.set()

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Command:
        if command[0] == "missing":
            raise LumarisError("bad_command")
        found = Command(command, tty=tty, rows=rows, columns=columns)
        _guest(handle).commands.append(found)
        return found

    async def network_pid(self, handle: Handle) -> int:
        return 4242

    async def destroy(self, handle: Handle) -> None:
        return

    async def release(self, lease: str) -> None:
        self.released.append(lease)

    async def reap_orphans(self) -> int:
        return 0

    async def reap_left(self) -> int:
        return 0

    async def aclose(self) -> None:
        return


class PuppetNode(SmallNode):
    """A node with nothing but the puppet."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.puppet = Puppet()

    def _make_executor(self, tier: str) -> Any:
        return self.puppet


def _guest(handle: Handle) -> Guest:
    guest = handle.private["guest"]
    assert isinstance(guest, Guest)
    return guest
