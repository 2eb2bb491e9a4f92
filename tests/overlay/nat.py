"""A small internet of network namespaces: two public hosts, and two hosts behind their own NATs.

```
   r 203.0.113.1     s 203.0.113.129          public hosts
          |               |
   -------+---- bridge ---+-------+---------
          |                       |
   203.0.113.2 NAT         203.0.113.3 NAT    both drop what nobody inside asked for
          |                       |
   a 192.168.1.2           b 192.168.2.2
```

The NATs keep the source port ("preserving") or choose a random one ("random"). Every name carries
our process id, and everything is removed at the end, also after a failure; the next run removes
what a killed one left.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import pytest
import trio

Kind = Literal["preserving", "random"]

IPS = {"r": "203.0.113.1", "s": "203.0.113.129", "a": "192.168.1.2", "b": "192.168.2.2"}
OUTSIDE = {"a": "203.0.113.2", "b": "203.0.113.3"}
REQUIRE = "LUMARIS_REQUIRE_NAMESPACES"
_NETWORKS = ("net", "r", "s", "na", "nb", "a", "b")
_COMMAND_S = 20
_numbers = count()


@dataclass(frozen=True)
class NatWorld:
    """The namespaces by their short names: `r`, `s`, `a`, `b` for hosts, `na`, `nb` for NATs."""

    prefix: str

    def namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """The command that runs another inside a namespace."""
        return ["ip", "netns", "exec", self.namespace(name), *command]

    def ip(self, name: str) -> str:
        """The IP that a host has inside its own network."""
        return IPS[name]

    def outside(self, name: str) -> str:
        """The IP that the public hosts see of a host."""
        return OUTSIDE.get(name, IPS[name])

    async def run(self, name: str, *command: str) -> str:
        """Run a command inside a namespace; what it printed. Raises when it fails."""
        return await _run(*self.command(name, command))


def missing() -> str:
    """What this machine lacks for network namespaces; "" when it has all."""
    if os.geteuid() != 0:
        return "root"
    lacking = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
    return " and ".join(lacking)


def need_namespaces() -> None:
    """Skip the test, or fail it where namespaces are required, naming what is lacking."""
    lacking = missing()
    if not lacking:
        return
    reason = f"network namespaces need {lacking}"
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{reason}, and {REQUIRE}=1")
    pytest.skip(reason)


@asynccontextmanager
async def nat_world(kind: Kind = "preserving") -> AsyncGenerator[NatWorld]:
    """The topology above, until the context ends. Skips the test where it cannot be made."""
    need_namespaces()
    world = NatWorld(f"lum{os.getpid()}x{next(_numbers)}")
    await _sweep()
    try:
        try:
            await _build(world, kind)
        except trio.TooSlowError:
            raise
        except OSError as error:
            if os.environ.get(REQUIRE) == "1":
                raise
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield world
    finally:
        with trio.CancelScope(shield=True):
            await _remove(world)


async def _build(world: NatWorld, kind: Kind) -> None:
    space = world.namespace
    net = space("net")
    lines = [f"netns add {space(name)}" for name in _NETWORKS]
    await _batch(lines)
    await _batch(["link set lo up"], *_NETWORKS, world=world)
    await _batch(["link add br0 type bridge", "link set br0 up"], "net", world=world)
    wan = {"r": IPS["r"], "s": IPS["s"], "na": OUTSIDE["a"], "nb": OUTSIDE["b"]}
    for name, ip in wan.items():
        await _batch(
            [
                f"link add v{name} netns {net} type veth peer name wan netns {space(name)}",
                f"-n {net} link set v{name} master br0 up",
            ]
        )
        await _batch([f"addr add {ip}/24 dev wan", "link set wan up"], name, world=world)
    for name, nat in (("a", "na"), ("b", "nb")):
        ip = IPS[name]
        gate = ip.rpartition(".")[0] + ".1"
        await _batch(
            [f"link add lan netns {space(nat)} type veth peer name eth0 netns {space(name)}"]
        )
        await _batch([f"addr add {gate}/24 dev lan", "link set lan up"], nat, world=world)
        await _batch(
            [f"addr add {ip}/24 dev eth0", "link set eth0 up", f"route add default via {gate}"],
            name,
            world=world,
        )
        await _translate(world, nat, kind)


async def _translate(world: NatWorld, nat: str, kind: Kind) -> None:
    masquerade = ["--random-fully"] if kind == "random" else []
    await world.run(nat, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    known = ["-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"]
    new = ["-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"]
    for rule in (
        ["-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE", *masquerade],
        ["-P", "FORWARD", "DROP"],
        ["-A", "FORWARD", "-i", "lan", "-j", "ACCEPT"],
        ["-A", "FORWARD", *known],
        ["-A", "INPUT", "-i", "wan", *new],
    ):
        await world.run(nat, "iptables", "-w", *rule)


async def _batch(lines: list[str], *names: str, world: NatWorld | None = None) -> None:
    if world is None:
        for line in lines:
            await _run("ip", *line.split())
        return
    text = "\n".join(lines).encode()
    for name in names:
        await _run("ip", "-n", world.namespace(name), "-batch", "-", stdin=text)


async def _run(*command: str, stdin: bytes = b"") -> str:
    with trio.fail_after(_COMMAND_S):
        done = await trio.run_process(
            command, stdin=stdin, capture_stdout=True, capture_stderr=True, check=False
        )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


async def _sweep() -> None:
    """Remove what test runs left that were killed themselves."""
    folder = Path("/run/netns")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = re.fullmatch(r"(lum(\d+)x\d+)-\w+", path.name)
        if found is not None and not Path("/proc", found[2]).exists():
            await _remove(NatWorld(found[1]))


async def _remove(world: NatWorld) -> None:
    """End what still runs in the namespaces, then remove them with all their links."""
    for name in _NETWORKS:
        if not Path("/run/netns", world.namespace(name)).exists():
            continue
        with suppress(OSError, trio.TooSlowError):
            for pid in (await _run("ip", "netns", "pids", world.namespace(name))).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        with suppress(OSError, trio.TooSlowError):
            await _run("ip", "netns", "delete", world.namespace(name))
