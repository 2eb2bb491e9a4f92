"""`daemon`, `netcheck` and `ping` with real processes: the buyer of a devnet of one seller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumaris.testing.devnet import Devnet
from lumaris_overlay import process_file
from tests.planet.test_faults import IMAGE, QUICK, eventually
from tests.sdk.cli.command import assert_one_message, shape_of, spawn

pytestmark = [pytest.mark.planet, pytest.mark.slow]

_STATUS = {
    "status": "str",
    "pid": "int",
    "uptime_s": "int",
    "memory_bytes": "int",
    "memory_bytes_max": "int",
    "peer": "str",
    "network": "str",
    "peers": "int",
    "adverts": "int",
    "reachability": "str",
    "addresses": ["str"],
    "linger_s": "float",
    "socket": "str",
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    with Devnet(tmp_path_factory.mktemp("n") / "d", sellers=1) as devnet:
        yield devnet


@pytest.fixture
def state(net: Devnet) -> Iterator[Path]:
    """The buyer's folder; no overlay process runs before and after."""
    yield net.buyer_state
    assert _say(net, "daemon", "down").returncode == 0
    assert process_file.holder(net.buyer_state / "overlay") is None


def _say(net: Devnet, *words: str) -> subprocess.CompletedProcess[str]:
    return spawn(*words, state=net.buyer_state)


def _buy(net: Devnet, *words: str) -> subprocess.CompletedProcess[str]:
    return spawn("--coordinator", net.url, *words, state=net.buyer_state)


def _json(found: subprocess.CompletedProcess[str]) -> Any:
    assert found.returncode == 0, found.stdout + found.stderr
    return json.loads(found.stdout)


def test_up_status_down(net: Devnet, state: Path) -> None:
    assert_one_message(_say(net, "daemon", "status").stderr, "not_running")
    first = _json(_buy(net, "daemon", "up", "--linger", "2m", "--json"))
    assert shape_of(first) == {"started": "bool", **_STATUS}
    assert first["started"] and first["linger_s"] == 120
    again = _buy(net, "daemon", "up")
    assert again.stdout.split() == ["already", "running", str(first["pid"])]
    found = _json(_say(net, "daemon", "status", "--json"))
    assert shape_of(found) == _STATUS
    assert found["pid"] == first["pid"] and found["network"] == "devnet"
    assert 0 < found["memory_bytes"] < found["memory_bytes_max"]
    shown = _say(net, "daemon", "status")
    assert shown.stdout.startswith("Running: ") and found["socket"] in shown.stdout
    down = _json(_say(net, "daemon", "down", "--json"))
    assert down == {
        "stopped": True,
        "pid": first["pid"],
        "started_again": False,
        "state": str(state),
    }
    assert not Path(found["socket"]).exists()
    twice = _say(net, "daemon", "down")
    assert (twice.returncode, twice.stdout) == (0, "was not running\n")


def test_commands_at_once_share_one_process(net: Devnet, state: Path) -> None:
    said: list[Any] = []
    threads = [
        threading.Thread(target=lambda: said.append(_json(_buy(net, "daemon", "up", "--json"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({found["pid"] for found in said}) == 1
    assert _json(_buy(net, "offers", "--json"))["seen"] == 1
    found = _json(_say(net, "daemon", "status", "--json"))
    assert found["pid"] == said[0]["pid"]
    assert found["adverts"] == 1 and found["peers"] >= 1


def test_after_a_kill_the_next_command_starts_it(net: Devnet, state: Path) -> None:
    pid = _json(_buy(net, "daemon", "up", "--json"))["pid"]
    os.kill(pid, signal.SIGKILL)
    folder = state / "overlay"
    eventually(lambda: not process_file.is_held(folder), "the process is gone")
    assert_one_message(_say(net, "daemon", "status").stderr, "not_running")
    assert (folder / "overlay.sock").exists()
    found = _json(_buy(net, "daemon", "up", "--json"))
    assert found["started"] and found["pid"] != pid


def test_a_client_goes_on_when_the_process_is_killed_or_ended(net: Devnet, state: Path) -> None:
    with net.client() as client:
        assert client.run(IMAGE, QUICK).ok
        facts = process_file.holder(state / "overlay")
        assert facts is not None
        os.kill(facts.pid, signal.SIGKILL)
        assert client.run(IMAGE, QUICK).stdout == b"42\n"
        down = _say(net, "daemon", "down")
        assert down.returncode == 0 and down.stdout == "stopped\n"
        assert client.run(IMAGE, QUICK).stdout == b"42\n"


def test_a_frozen_process_is_named_and_ended(net: Devnet, state: Path) -> None:
    pid = _json(_buy(net, "daemon", "up", "--json"))["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert_one_message(_buy(net, "daemon", "up").stderr, "overlay_failed")
    assert_one_message(_say(net, "daemon", "status").stderr, "overlay_failed")
    assert _say(net, "daemon", "down").stdout == "stopped\n"


def test_somebody_elses_file_in_the_sockets_place(net: Devnet, state: Path) -> None:
    path = state / "overlay" / "overlay.sock"
    path.parent.mkdir(exist_ok=True)
    path.write_text("notes")
    assert_one_message(_buy(net, "daemon", "up").stderr, "config_invalid")
    assert _say(net, "daemon", "down").stdout == "was not running\n"
    assert path.read_text() == "notes"
    path.unlink()


def test_netcheck(net: Devnet, state: Path) -> None:
    found = _json(_buy(net, "netcheck", "--json"))
    assert net.nodes[0].peer in [peer["peer"] for peer in found["peers"]]
    assert found["addresses"] and found["reachability"] in ("unknown", "public", "private")
    assert found["clock_peers"] == len(found["peers"])
    assert abs(found["clock_offset_s"]) < 5
    shown = _buy(net, "netcheck")
    assert shown.returncode == 0 and "verdict" in shown.stdout
    node = _json(_say(net, "netcheck", "--node", "--state", net.nodes[0].state, "--json"))
    assert node["addresses"]


def test_ping(net: Devnet, state: Path) -> None:
    seller = net.nodes[0].peer
    found = _json(_buy(net, "ping", seller[-10:], "-c", "2", "--json"))
    assert found["peer"] == seller and found["path"] == "direct"
    assert found["sent"] == found["received"] == 2
    assert 0 < found["round_trip_ms"]["min"] <= found["round_trip_ms"]["max"]
    shown = _buy(net, "ping", seller, "-c", "1")
    assert shown.returncode == 0 and shown.stdout.startswith("1  direct  ")
    nobody = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
    assert _buy(net, "ping", nobody, "-c", "1").returncode == 10
    assert_one_message(_buy(net, "ping", "nosuchpeer").stderr, "not_found")


def test_another_network_in_the_same_folder_is_refused(net: Devnet, state: Path) -> None:
    _json(_buy(net, "daemon", "up", "--json"))
    cache = state / "membership.json"
    kept = cache.read_text()
    standing = json.loads(kept)
    standing["info"]["network"] = "another"
    standing["key_list"] = ""  # its signature is the network's
    cache.write_text(json.dumps(standing))
    try:
        refused = _buy(net, "daemon", "up")
        assert_one_message(refused.stderr, "config_invalid")
        assert "devnet" in refused.stderr
    finally:
        cache.write_text(kept)
