"""Two strangers on one machine see nothing of each other, and nothing of the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.overlay.nat import need_namespaces
from tests.planet import egress_market
from tests.planet.execution import TIERS, Arena, Shelf, arena

pytestmark = [pytest.mark.planet, pytest.mark.slow]

SECRET = "sesame-of-the-first"
NATIVE_FIRST = f"""
import os, socket, time
for folder in ('/tmp', '/dev/shm', '/out'):
    try:
        open(folder + '/{SECRET}', 'w').write('{SECRET}')
    except OSError:
        pass
tcp = socket.socket(); tcp.bind(('127.0.0.1', 4242)); tcp.listen()
unix = socket.socket(socket.AF_UNIX); unix.bind('\\0{SECRET}'); unix.listen()
if os.fork() == 0:
    os.setsid()
else:
    print('on', flush=True)
while True: time.sleep(1)
"""
WASM_FIRST = f"""
import time
for folder in ('/tmp', '/out'):
    try:
        open(folder + '/{SECRET}', 'w').write('{SECRET}')
    except OSError:
        pass
print('on', flush=True)
while True: time.sleep(1)
"""
FILES = f"""
import os
found = [value for value in os.environ.values() if '{SECRET}' in value]
for folder in ('/tmp', '/dev/shm', '/out', '/in'):
    try:
        found += [folder + '/' + name for name in os.listdir(folder)]
    except OSError:
        pass
"""
NATIVE_SECOND = (
    FILES
    + f"""
import socket
for name in os.listdir('/proc'):
    if name.isdigit() and int(name) != os.getpid():
        try:
            text = open('/proc/' + name + '/environ', 'rb').read()
        except OSError:
            continue
        if b'sesame' in text:
            found.append(name)
for family, address in ((socket.AF_INET, ('127.0.0.1', 4242)), (socket.AF_UNIX, '\\0{SECRET}')):
    with socket.socket(family) as stream:
        try:
            stream.connect(address)
            found.append(address)
        except OSError:
            pass
print(found)
"""
)
WASM_SECOND = FILES + "print(found)\n"
MARKET_S = 240


@pytest.fixture(scope="module")
def market(
    tmp_path_factory: pytest.TempPathFactory, shelf: Shelf, tiers: tuple[str, ...]
) -> Iterator[Arena]:
    """One seller, for two buyers."""
    with arena(tmp_path_factory.mktemp("two"), shelf, tiers) as found:
        yield found
        found.settle()


@pytest.mark.parametrize("tier", TIERS)
def test_the_second_buyer_sees_nothing_of_the_first(
    market: Arena, tier: str, request: pytest.FixtureRequest
) -> None:
    if tier == "container":
        request.getfixturevalue("docker_engine")
    first, second = (WASM_FIRST, WASM_SECOND) if tier == "wasm" else (NATIVE_FIRST, NATIVE_SECOND)
    environment = market.request(tier, "").environment
    secret = {**environment, "SECRET": SECRET}
    with market.running(
        tier, first, until="on", buyer="first", wall_s=20, environment=secret
    ) as job:
        beside = market.run(tier, second, buyer="second")
        assert beside.ok and beside.stdout == b"[]\n", beside
        assert not job.done()
        market.clients.pop("first").close()
        assert job.result().reason != "succeeded"
    after = market.run(tier, second, buyer="second")
    assert after.ok and after.stdout == b"[]\n", after
    shutil.rmtree(market.net.state / "first", ignore_errors=True)


@contextmanager
def networks() -> Iterator[str]:
    """The namespace of a seller, with a public host beside it; its name."""
    need_namespaces()
    ours, public = f"lumeg{os.getpid()}n", f"lumeg{os.getpid()}u"
    lines = [
        f"netns add {ours}",
        f"netns add {public}",
        f"link add wan netns {ours} type veth peer name wan netns {public}",
        f"-n {ours} link set lo up",
        f"-n {public} link set lo up",
        f"-n {ours} addr add {egress_market.OWN}/24 dev wan",
        f"-n {public} addr add {egress_market.ALLOWED}/24 dev wan",
        f"-n {public} addr add {egress_market.UNNAMED}/24 dev wan",
        f"-n {public} addr add {egress_market.METADATA}/32 dev wan",
        f"-n {ours} link set wan up",
        f"-n {public} link set wan up",
        f"-n {ours} route add default via {egress_market.ALLOWED}",
    ]
    server = "from tests.planet.egress_market import serve\nprint(flush=True)\nserve('0.0.0.0')"
    try:
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, timeout=20)
        command = [*inside(public), sys.executable, "-c", server]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as host:
            try:
                assert host.stdout is not None
                assert host.stdout.readline() == b"\n"
                yield ours
            finally:
                host.kill()
    finally:
        for name in (ours, public):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def inside(name: str) -> list[str]:
    """What runs a command in a network namespace; `ip netns exec` would hide control groups."""
    return ["nsenter", f"--net=/run/netns/{name}"]


def test_a_job_reaches_only_what_its_agreement_names(
    shelf: Shelf, tiers: tuple[str, ...], tmp_path: Path
) -> None:
    names = ",".join(tier for tier in tiers if tier != "wasm")
    module = [sys.executable, "-m", "tests.planet.egress_market", str(tmp_path), names]
    with networks() as name:
        done = subprocess.run(
            [*inside(name), *module], stdout=subprocess.PIPE, timeout=MARKET_S, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {f"{tier} {way}" for tier in names.split(",") for way in ("out", "none")}
    refused = {host: ["403"] for host in egress_market.TARGETS}
    alone = {host: ["no proxy"] for host in egress_market.TARGETS}
    for key, said in found.items():
        if key.endswith("out"):
            assert said == {**refused, egress_market.ALLOWED: ["200", "reached"]}, key
        else:
            assert said == alone, key
