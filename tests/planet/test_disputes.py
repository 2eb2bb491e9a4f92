"""A seller that lies about a result, in a market of real processes: it is found out and pays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import wasmtime

from lumaris.coordinator import CoordinatorLink
from lumaris.jobs import JobRequest, JobResult
from lumaris.testing.devnet import Devnet, Program
from lumaris_overlay.private_files import load_or_create_key, make_private_folder
from lumaris_protocol import coordinator_api
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import MIB
from tests import market as m
from tests.bonded import BOND, lock_bond
from tests.planet.execution import Shelf, eventually, settled
from tests.planet.liar import LIES
from tests.sdk.cli.command import call, json_of

pytestmark = [pytest.mark.planet, pytest.mark.slow]


class Fraud(Devnet):
    """Sellers that lie until they are told not to."""

    def _spawn(self, role: str, module: str, folder: Path, arguments: Sequence[str]) -> Program:
        if role != "coordinator":
            module = "tests.planet.liar"
            make_private_folder(folder)
            (folder / LIES).touch()
        return super()._spawn(role, module, folder, arguments)


def _reads(net: Devnet, *words: str | Path) -> Any:
    """What a command of the buyer's says."""
    found = call("--coordinator", net.url, *words, "--json", state=net.buyer_state)
    assert found.exit_code == 0, found.output
    return json_of(found)


async def _lock_bonds(net: Devnet) -> None:
    for node in net.nodes:
        link = CoordinatorLink(net.url)
        try:
            info = await link.call(coordinator_api.info())
            key = load_or_create_key(Path(node.state) / "node.key")
            await lock_bond(link.call, key, coordinator=info.coordinator, network=info.network)
        finally:
            await link.aclose()


async def _bond_of(net: Devnet, node: Program) -> int:
    token = json.loads((Path(node.state) / "membership.json").read_bytes())["token"]
    link = CoordinatorLink(net.url)
    try:
        (bond,) = (await link.call(coordinator_api.bonds(token))).bonds
        return bond.locked_nanos
    finally:
        await link.aclose()


def _sold(net: Devnet, guest: Path) -> JobResult:
    """The lie: a job that ended well, paid and settled."""
    request = JobRequest(
        str(guest), ("guest", m.HELLO), memory_bytes=16 * MIB, disk_bytes=MIB, wall_s=30, attempts=1
    )
    with net.client() as client:
        sold = client.run_request(request)
        eventually(lambda: settled(client), "the job is paid")
        with pytest.raises(LumarisError, match="evidence_insufficient"):
            client.open_dispute(sold.job, "not_delivered")
        assert client.disputes() == []
    assert (sold.ok, sold.stdout) == (True, b"")
    return sold


def test_a_lie_is_found_out_and_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Shelf
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    guest = tmp_path / "guest.wasm"
    guest.write_bytes(wasmtime.wat2wasm(m.GUEST_TEXT))
    net = Fraud(tmp_path / "net", sellers=2, tiers=("wasm",))
    shelf.stock(net, "")
    with net:
        trio.run(_lock_bonds, net)
        sold = _sold(net, guest)
        liar, honest = sorted(net.nodes, key=lambda node: node.peer != sold.seller)
        (Path(honest.state) / LIES).unlink()
        before = _reads(net, "wallet", "show")["free_nanos"]
        claim = ("--claim", "wrong_result", "--yes")
        opened = _reads(net, "dispute", "open", sold.job, *claim)
        name, price = opened["dispute"], opened["amount_nanos"]
        # Whatever comes after the opening has the checkers listed, and then one of them drawn.
        for words in ((), ("--done",)):
            _reads(net, "dispute", "evidence", name, *words, "--state", liar.state)
        eventually(lambda: _reads(net, "dispute", "show", name)["checkers"], "a checker is drawn")
        shown = _reads(net, "dispute", "show", name)
        assert shown["checkers"] == [honest.peer]
        checked = _reads(net, "dispute", "check", name, "--image", guest, "--yes")
        ruling = checked["ruling"]
        assert (checked["state"], ruling["rule"], ruling["fault"]) == (
            "settled",
            "result_differs",
            "seller",
        )
        assert ruling["refund_nanos"] == price > 0
        # At most half of what is lost beyond the refund goes to the victim.
        fine = ruling["collected_nanos"] - price
        assert ruling["victim_nanos"] == fine // 2
        assert fine > 0
        bonds = [trio.run(_bond_of, net, node) for node in (liar, honest)]
        assert bonds == [BOND - ruling["collected_nanos"], BOND]
        paid = {item["seller"]: item["total_nanos"] for item in _sessions(net)}
        assert set(paid) == {liar.peer, honest.peer}
        after = _reads(net, "wallet", "show")
        assert after["free_nanos"] == (
            before - paid[honest.peer] + price + ruling["victim_nanos"]
        ), "the opener's bond came back"
        assert after["held_nanos"] == 0
        _replay(net, name, tmp_path)


def _sessions(net: Devnet) -> list[dict[str, Any]]:
    with net.client() as client:
        audit = client.audit()
        assert audit.balanced
        assert audit.sum_nanos == 0
        return client.sessions()


def _replay(net: Devnet, name: str, folder: Path) -> None:
    """The file holds offline, and no longer with one bit of it turned."""
    file = folder / "dispute.json"
    _reads(net, "dispute", "show", name, "--save", file)
    coordinator = net.coordinator
    assert coordinator is not None
    offline = folder / "nowhere"
    words = ("verify", "dispute", file, "--coordinator", coordinator.peer)
    assert call(*words, state=offline).exit_code == 0
    assert call("verify", "dispute", file, state=offline).exit_code == 2
    data = bytearray(file.read_bytes())
    ruling = json.loads(data)["ruling"]["ruling"].encode()
    data[data.index(ruling) + len(ruling) // 2] ^= 1
    file.write_bytes(data)
    assert call(*words, state=offline).exit_code == 1
