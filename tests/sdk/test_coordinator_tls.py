"""The line to a coordinator over TLS: whom it trusts, and the certificate it gets by itself."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lumaris import profile as profiles
from lumaris.coordinator import CoordinatorLink, open_link
from lumaris_coordinator.authority import Authority
from lumaris_overlay.coordinator_tls import FILE_NAME, CoordinatorTls
from lumaris_overlay.private_files import load_or_create_key
from lumaris_protocol import coordinator_api
from lumaris_protocol.coordinator_api import Bootstrap
from lumaris_protocol.errors import LumarisError
from tests.coordinator.served import Served

pytestmark = pytest.mark.slow

DAY_S = 24 * 3600
CLOSED = coordinator_api.bootstrap()  # what only callers with a certificate may ask


@contextmanager
def served(folder: Path, *, mutual: bool) -> Iterator[Served]:
    found = Served(folder, tls_names=("127.0.0.1",), mutual_tls=mutual)
    with found.running():
        yield found


def line(
    found: Served, folder: Path, *, clock: Callable[[], float] = time.time, ca: Path | None = None
) -> CoordinatorLink:
    """A caller with a folder of its own."""
    folder.mkdir(exist_ok=True)
    tls = CoordinatorTls(
        found.url,
        ca_file=ca or found.coordinator.authority.ca_file,
        key=load_or_create_key(folder / "key"),
        file=folder / FILE_NAME,
        clock=clock,
    )
    return CoordinatorLink(found.url, tls=tls)


def ask(open_line: Callable[[], CoordinatorLink]) -> None:
    """One call. The coordinator's thread is no part of trio, so trio runs for a call only."""

    async def call() -> None:
        link = open_line()
        try:
            await link.call(CLOSED)
        finally:
            await link.aclose()

    trio.run(call)


def code_of(open_line: Callable[[], CoordinatorLink]) -> str:
    """How a call ends."""
    try:
        ask(open_line)
    except LumarisError as error:
        return error.code
    return ""


def test_only_its_own_authority_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path / "coordinator", mutual=False) as found:
        monkeypatch.setenv("LUMARIS_CA_FILE", str(found.coordinator.authority.ca_file))
        right = profiles.load(state=tmp_path / "buyer", coordinator=found.url)
        assert code_of(lambda: open_link(right)) == ""
        assert not (right.state / FILE_NAME).exists()  # nobody asked for one
        (tmp_path / "foreign").mkdir()
        foreign = Authority(tmp_path / "foreign", now=int(time.time())).ca_file
        with pytest.raises(LumarisError, match="certificate_untrusted") as wrong:
            ask(lambda: line(found, tmp_path / "buyer", ca=foreign))
        assert found.url in wrong.value.message
        assert str(foreign) in wrong.value.hint
        monkeypatch.delenv("LUMARIS_CA_FILE")
        without = profiles.load(state=tmp_path / "buyer", coordinator=found.url)
        with pytest.raises(LumarisError, match="certificate_untrusted") as unnamed:
            ask(lambda: open_link(without))
        assert "LUMARIS_CA_FILE" in unnamed.value.hint
        elsewhere = found.url.replace("127.0.0.1", "localhost")
        tls = CoordinatorTls(elsewhere, ca_file=found.coordinator.authority.ca_file)
        assert code_of(lambda: CoordinatorLink(elsewhere, tls=tls)) == "certificate_untrusted"


def test_a_certificate_is_got_kept_and_renewed(tmp_path: Path) -> None:
    buyer, shift = tmp_path / "buyer", [0.0]
    kept = buyer / FILE_NAME

    def clock() -> float:
        return time.time() + shift[0]

    with served(tmp_path / "coordinator", mutual=True) as found:
        tls = CoordinatorTls(found.url, ca_file=found.coordinator.authority.ca_file)
        assert code_of(lambda: CoordinatorLink(found.url, tls=tls)) == "certificate_needed"
        assert code_of(lambda: line(found, buyer)) == ""
        first = kept.read_bytes()
        assert kept.stat().st_mode & 0o077 == 0
        assert code_of(lambda: line(found, buyer)) == ""
        assert kept.read_bytes() == first
        # Past half its life by our clock, which is then too wrong to prove anything: it goes on.
        shift[0] = 0.6 * DAY_S
        assert code_of(lambda: line(found, buyer, clock=clock)) == ""
        assert kept.read_bytes() == first
        # The times that stand beside it say it is old: another one is got.
        words = first.split(b"\n", 1)
        now = int(time.time())
        old = b"issued_at=%d expires_at=%d\n" % (now - 20 * 3600, now + 4 * 3600)
        kept.write_bytes(old + words[1])
        assert code_of(lambda: line(found, buyer)) == ""
        second = kept.read_bytes()
        assert second.split(b"\n", 1)[1] != words[1]
        kept.chmod(0o644)  # what others could read is not used
        assert code_of(lambda: line(found, buyer)) == ""
        assert kept.read_bytes() != second
        kept.write_bytes(old + b"no certificate")
        assert code_of(lambda: line(found, buyer)) == ""


def test_tasks_that_need_one_at_once_get_one(tmp_path: Path) -> None:
    with served(tmp_path / "coordinator", mutual=True) as found:
        answers: list[Bootstrap] = []

        async def together() -> None:
            link = line(found, tmp_path / "buyer")

            async def call() -> None:
                answers.append(await link.call(CLOSED))

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(call)
            await link.aclose()

        trio.run(together)
        assert len(answers) == 8
        asked = found.coordinator.metrics.text(())
        assert 'route="POST /v1/identity/tls-certificate",status="200"} 1\n' in asked


def test_a_new_authority_is_enrolled_with_again(tmp_path: Path) -> None:
    buyer = tmp_path / "buyer"
    with served(tmp_path / "coordinator", mutual=True) as found:
        assert code_of(lambda: line(found, buyer)) == ""
        before = (buyer / FILE_NAME).read_bytes()
    shutil.rmtree(tmp_path / "coordinator" / "tls")
    with served(tmp_path / "coordinator", mutual=True) as found:
        assert code_of(lambda: line(found, buyer)) == ""
        assert (buyer / FILE_NAME).read_bytes() != before


def test_a_port_without_tls_and_a_file_that_is_none(tmp_path: Path) -> None:
    found = Served(tmp_path / "coordinator")
    with found.running():
        secured = found.url.replace("http:", "https:")
        link = CoordinatorLink(secured)
        assert code_of(lambda: link) == "coordinator_unreachable"
    with pytest.raises(LumarisError, match="config_invalid"):
        CoordinatorLink(secured, tls=CoordinatorTls(secured, ca_file=tmp_path / "none"))
