"""A market whose coordinator speaks TLS alone, under its own authority, to members alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime

from lumaris.client import Client
from lumaris.testing.devnet import Devnet, Program
from lumaris_coordinator.authority import Authority
from lumaris_node import cli as node_cli
from lumaris_overlay.coordinator_tls import FILE_NAME
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.errors import LumarisError
from tests.sdk.cli.command import call

pytestmark = [pytest.mark.planet, pytest.mark.slow]

# The smallest guest there is: compiling CPython would take most of the test's time.
GUEST = '(module (memory (export "memory") 1) (func (export "_start")))'


class TlsDevnet(Devnet):
    """A devnet whose coordinator was set up by its operator, and whose seller by its owner."""

    def start_coordinator(self) -> None:
        """`init`, then `up`."""
        folder = self.state / "coordinator"
        terms = ("--network", "town", "--port", "0", "--no-overlay")
        tls = ("--tls-name", "127.0.0.1", "--mutual-tls")
        made = call("coordinator", "init", "--state", folder, *terms, *tls)
        assert str(self.authority) in made.stderr  # what everybody needs
        words = ["coordinator", "up", "--state", str(folder)]
        self.coordinator = self._spawn("coordinator", "lumaris.cli", folder, words)

    def start_seller(self, name: str) -> Program:
        """A node that knows the authority by its settings."""
        folder = self.state / name
        make_private_folder(folder)
        text = f'coordinator_ca = "{self.authority}"\n[accept]\nruntimes = ["wasm"]\n'
        (folder / "node.toml").write_text(text)
        words = ["node", "up", "--state", str(folder), "--coordinator", self.url]
        return self._spawn(name, "lumaris.cli", folder, words)

    @property
    def authority(self) -> Path:
        """What the operator gives to everybody."""
        return self.state / "coordinator" / "tls" / "ca.pem"


@pytest.fixture
def net(tmp_path: Path) -> Iterator[TlsDevnet]:
    found = TlsDevnet(tmp_path / "net", sellers=1)
    with found:
        yield found


def test_everybody_trades_over_mutual_tls(
    net: TlsDevnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert net.url.startswith("https://127.0.0.1:")
    foreign = Authority(tmp_path, now=0).ca_file
    monkeypatch.setenv("LUMARIS_CA_FILE", str(foreign))
    with pytest.raises(LumarisError, match="certificate_untrusted") as wrong, net.client():
        pass
    assert str(foreign) in wrong.value.hint
    with pytest.raises(LumarisError, match="certificate_untrusted"):
        node_cli.run(tmp_path / "node", coordinator=net.url, coordinator_ca=str(foreign))
    monkeypatch.setenv("LUMARIS_CA_FILE", str(net.authority))
    module = tmp_path / "guest.wasm"
    module.write_bytes(wasmtime.wat2wasm(GUEST))
    with net.client() as client:
        assert client.run(str(module), ["guest"]).ok
        client.settle()
        assert_paid(client)
    for folder in (net.buyer_state, Path(net.nodes[0].state)):
        assert (folder / FILE_NAME).stat().st_mode & 0o077 == 0  # each got a certificate


def assert_paid(client: Client) -> None:
    """The money has moved and none is held."""
    account = client.account()
    assert account.held_nanos == 0
    assert 0 < account.free_nanos < 100 * 10**9
