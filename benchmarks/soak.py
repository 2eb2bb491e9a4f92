"""Whether a host stays as it is over thousands of connects and streams and an hour of churn.

    python benchmarks/soak.py [--connects N] [--streams N] [--minutes M] [--json]

One host in this process is what is measured; guests, also here, connect, open streams, leave and
come back with new identities. Prints resident memory, descriptors and tasks as time goes on: after
the first tenth they should not grow. The defaults are short; the long form is
`--connects 2000 --streams 20000 --minutes 60`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import trio

from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay, open_host
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol.keys import KeyPair

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.overlay_world import (
    KEYS,
    NETWORK,
    advert,
    certificate,
    memory_mib,
    new_key,
)

PROTOCOL = "/lumaris/soak/1"
SAMPLES = 10
STREAM_S = 20.0
# A guest's whole host is replaced after so many of its connections.
CONNECTS_PER_GUEST = 20
REST_S = 1.5


def main() -> None:
    """Run the soak and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connects", type=int, default=60)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on at least so long")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    logging.getLogger("lumaris_overlay").setLevel(logging.ERROR)
    samples = trio.run(soak, options.connects, options.streams, options.minutes, options.json)
    early, late = samples[min(1, len(samples) - 1)], samples[-1]
    rows = [
        _row("resident memory at the end", late["memory_mib"], "MiB", None),
        _row("memory grown since the first tenth", late["memory_mib"] - early["memory_mib"], "MiB"),
        _row("descriptors grown", late["descriptors"] - early["descriptors"], "", 5),
        _row("tasks grown", late["tasks"] - early["tasks"], "", 10),
        _row("failed connects and streams", late["failed"], "", 0),
    ]
    if options.json:
        print(json.dumps({"rows": rows, "samples": samples}))
        return
    for row in rows:
        mark = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
        print(f"{row['name']:44} {row['value']:12.3f} {row['unit']:8} {row['bar']:10} {mark}")


def _row(name: str, value: float, unit: str, most: float | None = 20) -> dict[str, Any]:
    bar = "" if most is None else f"<= {most:g}"
    holds = None if most is None else value <= most
    return {"name": name, "value": round(value, 3), "unit": unit, "bar": bar, "holds": holds}


async def soak(connects: int, streams: int, minutes: float, quiet: bool) -> list[dict[str, Any]]:
    """Samples of one host, the first before anything happened."""
    key = new_key()
    async with open_host(_config(key)) as host, host.serve(PROTOCOL, echo):
        await host.publish_advert(advert(key))
        run = _Soak(host, streams_each=max(1, streams // max(1, connects)))
        samples = [await run.sample(quiet)]
        ends = time.monotonic() + 60 * minutes
        step = max(1, connects // SAMPLES)
        while run.connects < connects or time.monotonic() < ends:
            for _ in range(0, step, CONNECTS_PER_GUEST):
                await run.guest(min(step, CONNECTS_PER_GUEST))
            samples.append(await run.sample(quiet))
        return samples


def _config(key: KeyPair) -> HostConfig:
    return HostConfig(key=key, network=NETWORK, coordinator_keys=KEYS, certificate=certificate(key))


class _Soak:
    def __init__(self, host: Libp2pOverlay, *, streams_each: int) -> None:
        self._host, self._streams_each = host, streams_each
        self._began = time.monotonic()
        self.connects = self.streams = self.failed = 0

    async def guest(self, connects: int) -> None:
        """A new peer that comes and goes so many times, with an advert and streams each time."""
        key = new_key()
        address = (await self._host.reachability()).addresses
        async with open_host(_config(key)) as guest:
            await guest.publish_advert(advert(key))
            for _ in range(connects):
                self.connects += 1
                try:
                    if await guest.connect(address) != 1:
                        self.failed += 1
                        continue
                    for _ in range(self._streams_each):
                        await self._stream(guest)
                    await guest.connections.drop(self._host.host.get_id())
                except Exception as error:
                    self.failed += 1
                    print(f"failed: {error!r}", file=sys.stderr)

    async def _stream(self, guest: Libp2pOverlay) -> None:
        self.streams += 1
        with trio.fail_after(STREAM_S):
            stream = await guest.open_stream(self._host.peer_id, PROTOCOL)
            async with stream:
                await stream.send_all(b"x" * 1000)
                await stream.send_eof()
                while await stream.receive_some(4096):
                    pass

    async def sample(self, quiet: bool) -> dict[str, Any]:
        """What the process holds after a moment of rest."""
        await trio.sleep(REST_S)
        gc.collect()
        found = {
            "at_s": round(time.monotonic() - self._began, 1),
            "connects": self.connects,
            "streams": self.streams,
            "failed": self.failed,
            "memory_mib": round(memory_mib(os.getpid()), 1),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "peers": len(self._host.connections.live()),
        }
        if not quiet:
            print("  ".join(f"{name}={value}" for name, value in found.items()), flush=True)
        return found


async def echo(stream: OverlayStream) -> None:
    """Answer everything with itself."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


if __name__ == "__main__":
    main()
