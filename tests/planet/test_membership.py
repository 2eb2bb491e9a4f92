"""A node that starts while its coordinator is away, and one that comes back where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lumaris.testing.devnet import Devnet
from lumaris_node import cli as node_cli
from lumaris_overlay import process_file
from tests.planet.test_faults import IMAGE, QUICK, assert_money_rests, eventually

pytestmark = [pytest.mark.planet, pytest.mark.slow]


def test_a_node_starts_and_sells_without_its_coordinator(net: Devnet) -> None:
    with net.client() as client:
        assert client.run(IMAGE, QUICK).ok
        client.settle()
        address = net.nodes[0].address
        assert net.coordinator is not None
        net.nodes[0].end()
        net.coordinator.end(signal.SIGKILL)
        net.nodes[0] = net.start_seller(net.nodes[0].role)
        assert net.nodes[0].address == address  # where buyers remember it
        state = Path(net.nodes[0].state)
        assert node_cli.status(state)["network"] == "devnet"
        net.start_coordinator()
        result = client.run(IMAGE, QUICK)
        assert result.ok and result.stdout == b"42\n"
        assert_money_rests(client)


def test_a_nodes_overlay_killed_comes_back_at_the_same_address(net: Devnet) -> None:
    folder = Path(net.nodes[0].state) / "overlay"
    before = node_cli.status(folder.parent)["addresses"]
    facts = process_file.holder(folder)
    assert facts is not None
    os.kill(facts.pid, signal.SIGKILL)

    def is_back() -> bool:
        found = process_file.holder(folder)
        return found is not None and found.pid != facts.pid

    eventually(is_back, "the overlay runs again")
    assert node_cli.status(folder.parent)["addresses"] == before
    with net.client() as client:
        assert client.run(IMAGE, QUICK).ok
        assert_money_rests(client)
