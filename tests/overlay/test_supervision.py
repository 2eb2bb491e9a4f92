"""The overlay process under pressure: full memory, a kill in use, a port taken, a state in use."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lumaris_overlay import process_file, supervisor
from lumaris_overlay.process import MEMORY_STATUS
from lumaris_overlay.supervisor import (
    OverlayConfig,
    OverlayProcess,
    attach_or_spawn,
    end_shared,
    run_overlay,
)
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import MIB
from tests.overlay.test_process import alive, config_for, pids_of
from tests.overlay.world import advert, key_of, next_of, until

pytestmark = [pytest.mark.planet, pytest.mark.slow]

# Starts the real program beside a thread that takes memory once a file appears, and keeps it. It
# takes less than the kernel's own limit, or an allocation may fail here before the program looks.
FILLING = """
import sys, threading, time
from pathlib import Path
from lumaris_overlay.process import main
signal = Path(sys.argv.pop(1))
def fill():
    while not signal.exists():
        time.sleep(0.01)
    signal.unlink()
    taken = []
    for _ in range(80):
        taken.append(bytearray(b"x") * (4 << 20))
    while True:
        time.sleep(1)
threading.Thread(target=fill, daemon=True).start()
sys.exit(main())
"""


@dataclass(frozen=True)
class FillingConfig(OverlayConfig):
    """An overlay process that fills its memory when told."""

    @property
    def signal(self) -> Path:
        return self.state_dir / "fill"

    def command(self, *extra: str) -> list[str]:
        python, _, _module, *arguments = super().command(*extra)
        return [python, "-c", FILLING, str(self.signal), *arguments]


async def test_a_process_that_hangs_is_killed_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.3)
    config = config_for(tmp_path, "one")
    with trio.fail_after(60):
        async with run_overlay(config) as overlay, overlay.adverts() as events:
            await overlay.publish_advert(advert(key_of("one")))
            await next_of(events, key_of("one").peer_id)
            before = process_file.holder(config.state_dir)
            assert before is not None
            os.kill(before.pid, signal.SIGSTOP)
            await until(lambda: not alive(before.pid), timeout_s=30)
            await overlay.publish_advert(advert(key_of("one"), 2))
            assert (await next_of(events, key_of("one").peer_id)).seq == 2


async def test_a_restart_that_the_system_refuses_is_tried_again(tmp_path, monkeypatch):
    config = config_for(tmp_path, "one")
    refused = 0
    start = OverlayProcess._start

    async def start_later(process: OverlayProcess) -> None:
        nonlocal refused
        if process.starts == 1 and refused < 2:
            refused += 1
            raise BlockingIOError(11, "no process now")
        await start(process)

    monkeypatch.setattr(OverlayProcess, "_start", start_later)
    with trio.fail_after(60):
        async with run_overlay(config):
            (pid,) = pids_of(config)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pids_of(config) not in ([], [pid]), timeout_s=30)
    assert refused == 2


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path):
    """As when a program ends while its overlay process is started again."""
    config = config_for(tmp_path, "one")
    started = OverlayProcess(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(started._start)
        await until(lambda: started.pid is not None)
        (pid,) = pids_of(config)
        nursery.cancel_scope.cancel()
    assert started.pid is None
    assert not alive(pid)


async def test_a_process_that_fills_its_memory_ends_and_is_started_again(tmp_path):
    plain = config_for(tmp_path, "one")
    config = FillingConfig(
        key_file=plain.key_file,
        network=plain.network,
        coordinator_keys=plain.coordinator_keys,
        state_dir=plain.state_dir,
        memory_bytes_max=256 * MIB,
    )
    with trio.fail_after(60):
        async with run_overlay(config) as overlay, overlay.adverts() as events:
            await overlay.publish_advert(advert(key_of("one")))
            await next_of(events, key_of("one").peer_id)
            before = process_file.holder(config.state_dir)
            assert before is not None and before.memory_bytes_max == 256 * MIB
            addresses = (await overlay.reachability()).addresses
            config.signal.touch()
            await until(lambda: not before.alive)
            assert (await overlay.reachability()).addresses == addresses
            after = process_file.holder(config.state_dir)
            assert after is not None and after.pid != before.pid
    assert f"max_bytes={256 * MIB}" in config.log.read_text()


async def test_what_a_full_process_ends_with_is_told(tmp_path, caplog):
    config = config_for(tmp_path, "one", memory_bytes_max=32 * MIB)  # less than it needs to start
    with trio.fail_after(30), pytest.raises(LumarisError) as caught:
        async with run_overlay(config):
            await trio.sleep_forever()
    assert caught.value.code == "overlay_failed"
    assert "event=memory_limit" in config.log.read_text()
    result = await trio.run_process(config.command(), check=False, capture_stderr=True)
    assert result.returncode == MEMORY_STATUS


async def test_the_port_is_kept_over_restarts_and_left_when_it_is_taken(tmp_path):
    config = config_for(tmp_path, "one")

    async def address() -> str:
        async with run_overlay(config) as overlay:
            return (await overlay.reachability()).addresses[0]

    first = await address()
    assert await address() == first
    port = int(first.split("/")[4])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        second = await address()
    assert second != first
    assert await address() == second


@pytest.mark.parametrize("text", ["", "port", "99999999", "-1", "70000", "²"])
async def test_a_spoilt_port_file_is_ignored(tmp_path, text):
    config = config_for(tmp_path, "one")
    (config.state_dir / "port").write_text(text)
    async with run_overlay(config) as overlay:
        assert (await overlay.reachability()).addresses


async def test_a_second_process_on_one_state_is_refused_and_harms_nothing(tmp_path):
    config = config_for(tmp_path, "one")
    async with run_overlay(config) as overlay:
        second = OverlayProcess(config)
        with pytest.raises(LumarisError) as caught:
            await second.run()
        await second.end()
        assert caught.value.code == "already_running"
        assert config.socket.exists()
        assert await overlay.peers() == ()


async def test_the_lock_goes_with_a_killed_process(tmp_path):
    config = config_for(tmp_path, "one")
    assert process_file.holder(config.state_dir) is None
    async with attach_or_spawn(config):
        facts = process_file.holder(config.state_dir)
        assert facts is not None and facts.network == config.network
        assert facts.linger_s == config.linger_s
        assert process_file.resident_bytes(facts.pid) > 10 * MIB
    os.kill(facts.pid, signal.SIGKILL)
    await until(lambda: not process_file.is_held(config.state_dir))
    assert process_file.holder(config.state_dir) is None
    assert config.socket.exists()
    assert await end_shared(config.state_dir) is None
    assert not config.socket.exists()


async def test_a_shared_process_killed_in_use_is_started_again_once(tmp_path):
    config = config_for(tmp_path, "one")
    with trio.fail_after(60):
        async with attach_or_spawn(config) as one, attach_or_spawn(config) as two:
            await one.publish_advert(advert(key_of("one")))
            async with two.adverts() as events:
                await next_of(events, key_of("one").peer_id)
                (pid,) = pids_of(config)
                os.kill(pid, signal.SIGKILL)
                await until(lambda: not alive(pid))
                assert await two.peers() == ()
                assert await one.peers() == ()
                (again,) = pids_of(config)
                assert again != pid
                await one.publish_advert(advert(key_of("one"), 2))
                assert (await next_of(events, key_of("one").peer_id)).seq == 2
        ended = await end_shared(config.state_dir)
        assert ended is not None and ended.pid == again
    assert pids_of(config) == []


async def test_a_frozen_process_is_named_and_can_be_ended(tmp_path):
    config = config_for(tmp_path, "one")
    async with attach_or_spawn(config):
        (pid,) = pids_of(config)
    os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(60):
        with pytest.raises(LumarisError) as caught:
            async with attach_or_spawn(config):
                pass
        assert caught.value.code == "overlay_failed"
        facts = await end_shared(config.state_dir)
    assert facts is not None and facts.pid == pid and not alive(pid)
    assert not config.socket.exists()
    assert await end_shared(config.state_dir) is None


async def test_a_stale_socket_is_replaced_and_a_foreign_one_left_alone(tmp_path):
    config = config_for(tmp_path, "one")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(config.socket))
    async with attach_or_spawn(config) as overlay:
        assert overlay.peer_id == key_of("one").peer_id
    assert await end_shared(config.state_dir) is not None

    async def babble(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(config.socket))
    sock.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, babble, [trio.SocketListener(sock)])
        with pytest.raises(LumarisError) as caught:
            async with attach_or_spawn(config):
                pass
        assert caught.value.code == "config_invalid"
        assert await end_shared(config.state_dir) is None
        assert config.socket.exists()
        nursery.cancel_scope.cancel()
    config.socket.unlink()
    config.socket.write_text("somebody's notes")
    with pytest.raises(LumarisError) as caught:
        async with attach_or_spawn(config):
            pass
    assert caught.value.code == "config_invalid"
    assert await end_shared(config.state_dir) is None
    assert config.socket.read_text() == "somebody's notes"
    assert pids_of(config) == []


async def test_descriptors_are_raised_to_the_hard_limit(tmp_path):
    config = config_for(tmp_path, "one")
    async with attach_or_spawn(config):
        (pid,) = pids_of(config)
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (files,) = [line.split() for line in lines if line.startswith("Max open files")]
        assert files[3] == files[4]
    await end_shared(config.state_dir)


async def test_a_successor_waits_for_one_that_is_leaving(tmp_path):
    config = config_for(tmp_path, "one")
    facts = process_file.ProcessFacts(
        pid=os.getpid(),
        started_ticks=process_file.start_ticks(os.getpid()),
        started_at=0,
        network=config.network,
        linger_s=None,
        memory_bytes_max=0,
    )
    ready = trio.Event()

    async def start() -> None:
        async with run_overlay(config):
            ready.set()

    async with trio.open_nursery() as nursery:
        async with process_file.held(config.state_dir, facts):
            nursery.start_soon(start)
            await until(lambda: pids_of(config) != [])
            assert not ready.is_set()
        with trio.fail_after(30):
            await ready.wait()
