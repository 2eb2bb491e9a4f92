"""The overlay as its own process: start, stop, errors, death and return."""

from __future__ import annotations

import os
import signal
import socket
import sys

import pytest
import trio

from lumaris_overlay.private_files import read_key, write_key
from lumaris_overlay.socket import open_socket_overlay
from lumaris_overlay.supervisor import OverlayConfig, attach_or_spawn, run_overlay
from lumaris_protocol.errors import LumarisError
from tests.overlay.world import (
    KEYS,
    NETWORK,
    advert,
    certificate,
    echo,
    key_of,
    next_of,
    open_when_ready,
    until,
)

pytestmark = [pytest.mark.planet, pytest.mark.slow]


def config_for(tmp_path, name: str, **settings) -> OverlayConfig:
    state = tmp_path / name
    state.mkdir(exist_ok=True)
    key_file = state / "key"
    if not key_file.exists():
        write_key(key_file, key_of(name).seed)
    return OverlayConfig(
        key_file=key_file, network=NETWORK, coordinator_keys=KEYS, state_dir=state, **settings
    )


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids_of(config: OverlayConfig) -> list[int]:
    """The processes that were started with this state directory."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if b"lumaris_overlay" in words and str(config.socket).encode() in words:
                found.append(int(name))
    return found


async def test_two_processes_find_each_other_and_survive_a_kill(tmp_path):
    one = config_for(tmp_path, "one")
    async with run_overlay(one) as seller:
        assert seller.peer_id == key_of("one").peer_id
        addresses = (await seller.reachability()).addresses
        two = config_for(tmp_path, "two", bootstrap=addresses)
        async with (
            run_overlay(two) as buyer,
            buyer.adverts() as events,
            seller.serve("/echo/1", echo),
        ):
            await seller.present(certificate(seller.peer_id))
            await buyer.present(certificate(buyer.peer_id, roles=("buyer",)))
            await until_connected(buyer)
            await seller.publish_advert(advert(key_of("one")))
            assert (await next_of(events, key_of("one").peer_id)).seq == 1
            (pid,) = pids_of(one)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not alive(pid))
            with trio.fail_after(30):
                assert (await seller.reachability()).addresses == addresses
                stream = await open_when_ready(buyer, key_of("one").peer_id, "/echo/1")
                async with stream:
                    await stream.send_all(b"again")
                    assert await stream.receive_some() == b"again"
            await seller.publish_advert(advert(key_of("one"), 2))
            assert (await next_of(events, key_of("one").peer_id)).seq == 2
    assert pids_of(one) == pids_of(two) == []
    assert not one.socket.exists()


async def until_connected(overlay) -> None:
    with trio.fail_after(20):
        while not await overlay.peers():
            await trio.sleep(0.02)


async def test_port_in_use_is_the_processes_own_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = config_for(tmp_path, "one", listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(LumarisError) as caught:
            async with run_overlay(config):
                pass
    assert caught.value.code == "port_in_use"
    assert pids_of(config) == []


async def test_open_key_file_is_refused(tmp_path):
    config = config_for(tmp_path, "one")
    config.key_file.chmod(0o644)
    with pytest.raises(LumarisError) as caught:
        async with run_overlay(config):
            pass
    assert caught.value.code == "unsafe_key_file"


async def test_shared_process_is_started_once_found_again_and_leaves(tmp_path):
    config = config_for(tmp_path, "one", linger_s=0.5)
    pids = []

    async def use() -> None:
        async with attach_or_spawn(config) as overlay:
            assert overlay.peer_id == key_of("one").peer_id
            pids.extend(pids_of(config))

    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            nursery.start_soon(use)
        assert len(set(pids)) == 1
        other = config_for(tmp_path, "one", linger_s=0.5)
        with pytest.raises(LumarisError) as caught:
            async with attach_or_spawn(
                OverlayConfig(
                    key_file=other.key_file,
                    network="another",
                    coordinator_keys=KEYS,
                    state_dir=other.state_dir,
                )
            ):
                pass
        assert caught.value.code == "config_invalid"
        await until(lambda: not alive(pids[0]))
    assert not config.socket.exists()


async def test_process_ends_with_its_parent(tmp_path):
    config = config_for(tmp_path, "one")
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode(), child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with trio.fail_after(30):
        result = await trio.run_process(
            [sys.executable, "-c", code, *config.command("--with-parent")],
            capture_stdout=True,
            check=False,
        )
        assert result.stdout.startswith(b"ready ")
        await until(lambda: not alive(int(result.stdout.split()[-1])))


async def test_shutdown_call_ends_it_cleanly(tmp_path):
    config = config_for(tmp_path, "one")
    with trio.fail_after(30):
        async with attach_or_spawn(config):
            (pid,) = pids_of(config)
        async with open_socket_overlay(config.socket) as overlay:
            await overlay.shutdown()
            await until(lambda: not alive(pid))
    assert not config.socket.exists()


def test_key_file_round_trip(tmp_path):
    key = write_key(tmp_path / "key", b"k" * 32)
    assert read_key(tmp_path / "key").peer_id == key.peer_id
    with pytest.raises(FileExistsError):
        write_key(tmp_path / "key", b"x" * 32)
    for content in (b"", b"zz" * 32, b"00" * 31):
        path = tmp_path / "bad"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(LumarisError):
            read_key(path)
