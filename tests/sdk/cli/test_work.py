"""`run`, `map`, `offers`, `demo`, `devnet` and `node` against a market that is a few lines long."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from lumaris.cli import work
from lumaris.cli.live import read_stdin
from lumaris.jobs import Artifact, JobRequest, JobResult, JobUpdate, LogLine, Plan
from lumaris_protocol import codec, codes
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.matching import Match, MatchReport
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.money import Nanos
from tests.protocol import parties
from tests.protocol.samples import samples
from tests.sdk.cli.command import ERROR_SHAPE, assert_one_message, call, json_of, shape_of
from tests.sdk.cli.test_receipt import PAID

_IMAGE = "python:3.12-wasi"
_JOB = "job_" + "a" * 24
_SESSION = "ses_" + "b" * 24
_PLAN = Plan(
    seller=parties.SELLER.peer_id,
    region="eu-de",
    quote="qte_" + "c" * 24,
    rate_nanos_per_s=1_000,
    start_nanos=500,
    cap_nanos=10_000_000,
    currency="TEST",
    hold_until=1,
    considered=[("12D3KooWother", "eu-fr", 7)],
    excluded={"cpu_short": 2},
    seen=4,
)
_PLAN_SHAPE = {
    "seller": "str",
    "region": "str",
    "quote": "str",
    "currency": "str",
    "rate_nanos_per_s": "int",
    "start_nanos": "int",
    "cap_nanos": "int",
    "hold_until": "int",
    "seen": "int",
    "considered": [{"seller": "str", "region": "str", "lease_nanos": "int"}],
    "excluded": {"cpu_short": "int"},
}
_ARTIFACT_SHAPE = {"path": "str", "file": "str", "size_bytes": "int", "sha256": "str"}
_RUN_SHAPE = {
    "ok": "bool",
    "job": "str",
    "session": "str",
    "seller": "str",
    "reason": "str",
    "exit_status": "int",
    "wall_ms": "int",
    "cpu_ms": "int",
    "memory_peak_bytes": "int",
    "attempts": "int",
    "image": "str",
    "command": ["str"],
    "currency": "str",
    "cost": "str",
    "cost_nanos": "int",
    "released_nanos": "int",
    "receipt": "str",
    "stdout": "str",
    "stderr": "str",
    "artifacts": [_ARTIFACT_SHAPE],
    "plan": _PLAN_SHAPE,
}


def _result(**changes: Any) -> JobResult:
    values: dict[str, Any] = {
        "job": _JOB,
        "session": _SESSION,
        "seller": parties.SELLER.peer_id,
        "reason": "succeeded",
        "exit_status": 0,
        "stdout": b"6 \xff\n",
        "stderr": b"warned\n",
        "artifacts": {},
        "cost_nanos": Nanos(1_234),
        "wall_ms": 1_500,
        "cpu_ms": 1_400,
        "fuel": 9,
    }
    return JobResult(**{**values, **changes})


class Market:
    """A client that answers with prepared results, and remembers what it was asked."""

    def __init__(self) -> None:
        self.results = [_result()]
        self.requests: list[JobRequest] = []
        self.bought = 0
        self.closed = False
        self.receipts: bytes | None = PAID["file"].encode()
        self.during: Callable[[], None] = lambda: None
        self.adverts = [codec.sign(_advert(), parties.SELLER, parties.NETWORK)]

    def __enter__(self) -> Market:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def run_request(
        self, request: JobRequest, *, observe: Any, approve: Any, stdin: Any = None
    ) -> JobResult:
        self.stdin: Any = stdin
        self.requests.append(request)
        if not approve(_PLAN):
            raise LumarisError("interrupted", "Declined; nothing was spent.")
        self.bought += 1
        result = self.results[0]
        for done in (10, 34):
            observe(JobUpdate(_JOB, "preparing", result.seller, "layer", done << 20, 120 << 20))
        observe(JobUpdate(_JOB, "running", result.seller))
        observe(LogLine(_JOB, "stdout", result.stdout))
        observe(LogLine(_JOB, "stderr", result.stderr))
        self.during()
        return result

    def map(
        self, requests: Sequence[JobRequest], *, sellers: int, budget: str, on_result: Any
    ) -> list[JobResult]:
        self.requests += requests
        self.bought += 1
        for index, result in enumerate(self.results):
            on_result(index, result)
        return self.results

    def plan(self, request: JobRequest) -> MatchReport:
        return MatchReport((Match(self.adverts[0], 7, has_image=True),), 1, {}, 1)

    def offers(self) -> list[Any]:
        return self.adverts

    def settle(self) -> None:
        return None

    def receipt(self, name: str) -> bytes | None:
        assert name == _SESSION
        return self.receipts


def _advert() -> Advert:
    message = samples()["advert"][0]
    assert isinstance(message, Advert)
    return message


@pytest.fixture
def market(monkeypatch: pytest.MonkeyPatch) -> Market:
    market = Market()
    for module in ("run", "map", "offers"):
        monkeypatch.setattr(f"lumaris.cli.{module}.open_client", lambda _: market)
    return market


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    file = tmp_path / "delivered"
    file.write_bytes(b"result")
    return Artifact("deep/r.txt", file, 6, "sha256:" + "0" * 64)


# --- run ---


def test_run(market: Market) -> None:
    found = call("run", "--env", "A=b", "--memory", "1GiB", "--timeout", "1m", _IMAGE, "py", "-c")
    assert found.exit_code == 0
    assert found.stdout_bytes == b"6 \xff\n"
    assert "warned\n" in found.stderr
    last = found.stderr.splitlines()[-1]
    for part in ("succeeded exit 0", _JOB, "1.5 s", "0.000001234 TEST", PAID["receipt_id"]):
        assert part in last
    assert "cap      0.010000000 TEST" in found.stderr, "the cap is shown before"
    request = market.requests[0]
    assert request.command == ("py", "-c"), "what follows the image is the guest's"
    assert (request.wall_s, request.memory_bytes) == (60, 1 << 30)
    assert request.environment == {"A": "b"}
    assert market.closed


def test_a_long_preparation_is_a_moving_line_or_one_plain_one(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = call("run", _IMAGE, "python").stderr
    assert plain.count(f"{_JOB} preparing: layer at ") == 1
    said: list[str] = []
    monkeypatch.setattr("lumaris.cli.run.Progress.say", lambda _, text: said.append(text))
    monkeypatch.setattr("lumaris.cli.run.Progress.__init__", _moving)
    assert call("run", _IMAGE, "python").exit_code == 0
    far = [text.partition(" at ")[0] for text in said if "preparing" in text]
    assert far == [f"{_JOB} preparing: layer {done} MiB of 120 MiB" for done in (10, 34)]


def _moving(self: Any, *, quiet: bool = False) -> None:
    self._quiet, self._status, self.moving = quiet, None, True


def test_run_with_our_input(market: Market) -> None:
    assert call("run", "-i", "--feature", "exec", _IMAGE, "cat").exit_code == 0
    assert market.stdin is read_stdin
    assert market.requests[-1].stdin
    assert market.requests[-1].features == ("exec",)
    assert call("run", "--stdin-later", _IMAGE, "cat").exit_code == 0
    assert market.stdin is None
    assert market.requests[-1].stdin, "another program may send it"
    assert call("run", _IMAGE, "cat").exit_code == 0
    assert not market.requests[-1].stdin


def test_run_as_json(market: Market, artifact: Artifact, tmp_path: Path) -> None:
    market.results = [_result(artifacts={artifact.path: artifact})]
    found = call("run", "--json", "--out", tmp_path / "out", _IMAGE, "python")
    assert found.exit_code == 0
    assert not found.stderr
    assert shape_of(json_of(found)) == _RUN_SHAPE
    assert json_of(found)["stdout"] == "6 \ufffd\n"
    assert (tmp_path / "out" / "deep" / "r.txt").read_bytes() == b"result"


def test_a_failed_run_as_json_has_its_error(market: Market) -> None:
    market.results = [_result(reason="killed_memory", exit_status=None, cost_nanos=0)]
    found = call("--json", "run", _IMAGE, "python")
    assert found.exit_code == codes.CODES["killed_memory"].exit_code
    report = json_of(found)
    assert not report["ok"]
    assert shape_of({"error": report["error"]}) == ERROR_SHAPE


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        ("exit_nonzero", 1, 1),
        ("exit_nonzero", 124, 124),
        ("exit_nonzero", 125, 3),
        ("exit_nonzero", None, 3),
        ("killed_deadline", None, 8),
        ("platform_error", None, 125),
        ("seller_lost", None, 10),
        ("closed", None, 125),
        ("what the seller made up \x1b[2J", None, 125),
    ],
)
def test_exit_codes(market: Market, reason: str, status: int | None, code: int) -> None:
    market.results = [_result(reason=reason, exit_status=status, cost_nanos=0)]
    found = call("run", _IMAGE, "python")
    assert found.exit_code == code
    assert "\x1b" not in found.stderr
    if reason != "exit_nonzero":
        errors = [line for line in found.stderr.splitlines() if line.startswith("error[")]
        assert len(errors) == 1
        assert "No money moved." in errors[0]


def test_dry_run_spends_nothing(market: Market, tmp_path: Path) -> None:
    found = call("run", "--dry-run", "--out", tmp_path / "out", _IMAGE, "python")
    assert found.exit_code == 0
    assert "others   1 more fit of 4 seen (excluded: cpu_short 2)" in found.stderr
    shown = call("run", "--dry-run", "--json", _IMAGE, "python")
    assert shape_of(json_of(shown)) == {"plan": _PLAN_SHAPE}
    assert market.bought == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("answer", "bought"), [("y\n", 1), ("n\n", 0), ("\n", 1)])
def test_a_person_is_asked(
    market: Market, monkeypatch: pytest.MonkeyPatch, answer: str, bought: int
) -> None:
    monkeypatch.setattr("lumaris.cli.run.asks", lambda _settings, *, yes: not yes)
    found = call("run", _IMAGE, "python", input=answer)
    assert market.bought == bought
    assert found.exit_code == (0 if bought else 130)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [(b"\n", True), (b"Yes\n", True), (b"n\n", False), (b"", False), (b"what\n", False)],
)
def test_answers_on_a_terminal(typed: bytes, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    with open(ours) as stdin, open(theirs, "wb") as terminal:
        monkeypatch.setattr("sys.stdin", stdin)
        terminal.write(typed)
        terminal.close()
        assert work.confirm() is answer


def test_a_run_that_settles_later(market: Market) -> None:
    market.receipts = None
    assert call("run", _IMAGE, "python").stderr.splitlines()[-1].endswith("settles later")


def test_output_that_cannot_be_saved_is_told_with_its_money(
    market: Market, artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").write_text("in the way")
    market.results = [_result(artifacts={artifact.path: artifact})]
    found = call("run", "--out", tmp_path / "out", _IMAGE, "python")
    assert found.exit_code == 1
    assert "Money moved." in found.stderr


def test_sigterm_cancels_like_ctrl_c(market: Market) -> None:
    before = signal.getsignal(signal.SIGTERM)
    market.during = lambda: os.kill(os.getpid(), signal.SIGTERM)
    found = call("run", _IMAGE, "python")
    assert found.exit_code == 130
    assert market.closed, "sessions are ended and settled first"
    assert signal.getsignal(signal.SIGTERM) == before


# --- map ---


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_map(market: Market, files: list[Path], artifact: Artifact, tmp_path: Path) -> None:
    market.results = [_result(artifacts={artifact.path: artifact}), _result(stdout=b"two")]
    out = tmp_path / "out"
    found = call("map", _IMAGE, "wc", "{}", "--each", *files, "--out", out, "--sellers", "2")
    assert found.exit_code == 0
    assert [request.command for request in market.requests] == [
        ("wc", "/in/a.txt"),
        ("wc", "/in/b.txt"),
    ]
    assert market.requests[1].inputs == {"b.txt": files[1]}
    assert (out / "a.txt" / "out" / "deep" / "r.txt").read_bytes() == b"result"
    assert (out / "b.txt" / "stdout").read_bytes() == b"two"
    assert "2 ok, 0 failed, cost 0.000002468" in found.stderr
    assert not found.stdout


def test_map_with_a_failure(market: Market, files: list[Path]) -> None:
    market.results = [_result(), _result(reason="exit_nonzero", exit_status=2, cost_nanos=0)]
    found = call("map", "--each", *files, "--sellers", "1", _IMAGE, "wc", "{}")
    assert found.exit_code == 3
    assert found.stdout_bytes.count(b"==>") == 2
    assert "1 ok, 1 failed" in found.stderr


def test_each_ends_at_the_next_option(market: Market, files: list[Path]) -> None:
    found = call("map", "--each", *files, _IMAGE, "wc", "{}")
    assert_one_message(found.stderr, "usage")
    assert not market.requests


def test_map_as_json(market: Market, files: list[Path]) -> None:
    market.results = [_result(), _result(reason="exit_nonzero", exit_status=2)]
    found = call("map", "--json", _IMAGE, "wc", "{}", "--each", *files)
    assert found.exit_code == 3
    item = {
        "file": "str",
        "job": "str",
        "seller": "str",
        "ok": "bool",
        "reason": "str",
        "exit_status": "int",
        "cost_nanos": "int",
        "wall_ms": "int",
        "attempts": "int",
        "stdout": "str",
        "stderr": "str",
        "artifacts": [],
    }
    report = json_of(found)
    assert shape_of(report) == {
        "ok": "int",
        "failed": "int",
        "cost": "str",
        "cost_nanos": "int",
        "items": [item],
    }
    assert report["items"][1]["error"]["code"] == "exit_nonzero"


def test_map_dry_run(market: Market, files: list[Path]) -> None:
    found = call("map", "--dry-run", _IMAGE, "wc", "{}", "--each", *files)
    assert found.exit_code == 0
    assert "2 over up to 1 of 1 sellers" in found.stderr
    shown = json_of(call("map", "--dry-run", "--json", _IMAGE, "wc", "{}", "--each", *files))
    assert shown["plan"]["jobs"] == 2
    assert market.bought == 0


# --- offers ---

_ITEM = {
    "seller": "str",
    "region": "str",
    "tiers": {},
    "runtimes": [
        {
            "tier": "str",
            "version": "str",
            "assurance": "str",
            "features": [],
            "suite": "int",
            "tested_at": "int",
        }
    ],
    "benchmarks": {"cpu": "int"},
    "cached": [],
    "free": {"cpu_millis": "int", "memory_bytes": "int", "disk_bytes": "int", "gpus": []},
    "total": {"cpu_millis": "int", "memory_bytes": "int", "disk_bytes": "int", "gpus": []},
    "currency": "str",
    "start_nanos": "int",
    "hour_nanos": "int",
    "lease_s_max": "int",
    "expires_at": "int",
    "excluded_by": [],
}


def test_offers(market: Market) -> None:
    advert = market.adverts[0].message
    found = call("offers", "--duration", "60s", "--memory", "1MiB", "--disk", "0B")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.split("\n")[0].startswith("SELLER      REGION")
    assert advert.seller[-10:] in found.stdout
    shown = call("offers", "--json", "--duration", "60s", "--memory", "1MiB", "--disk", "0B")
    report = json_of(shown)
    assert report["seen"] == 1
    item = report["items"][0]
    item["tiers"] = {}
    for part in ("free", "total"):
        item[part]["gpus"] = []
    assert shape_of(item) == _ITEM


def test_offers_why(market: Market) -> None:
    words = ("--region", "mars", "--cpu", "1000")
    found = call("offers", *words)
    assert_one_message(found.stderr, "no_offers")
    assert found.exit_code == 6
    why = call("offers", "--why", *words)
    assert why.exit_code == 0
    assert "1 excluded by region_excluded: Add its region." in why.stderr
    assert "cpu_short" in why.stdout
    report = json_of(call("offers", "--why", "--json", *words))
    assert set(report["excluded"]) >= {"region_excluded", "cpu_short"}


def test_any_tier_that_has_the_feature_fits(market: Market) -> None:
    """The seller's first tier is not the only one it may be asked for."""
    first = _advert()
    plain = structs.replace(first.runtimes[0], tier="wasm", features=())
    live = structs.replace(plain, tier="process", features=("exec", "egress"))
    both = structs.replace(first, runtimes=(plain, live))
    market.adverts = [codec.sign(both, parties.SELLER, parties.NETWORK)]
    words = ("offers", "--duration", "60s", "--memory", "1MiB", "--disk", "0B")
    assert call(*words, "--feature", "exec", "--egress", "a.example:443").exit_code == 0
    assert call(*words, "--tier", "wasm", "--feature", "exec").exit_code == 6
    none = call(*words, "--feature", "forward", "--feature", "exec", "--egress", "a.example:1")
    assert "feature_missing of egress, exec, forward 1" in none.stderr
    assert "gpu_short" in call(*words, "--gpu", "L4:8").stderr
    assert "assurance_low" in call(*words, "--assurance", "vm").stderr


def test_no_sellers(market: Market) -> None:
    market.adverts = []
    assert_one_message(call("offers").stderr, "no_sellers")
    assert json_of(call("offers", "--why", "--json"))["items"] == []


# --- commands of other parts ---


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for what other packages do, by entry name; each gets its arguments recorded."""
    answers: dict[str, Any] = {"calls": []}

    def load(entry: str, *, extra: str = "all") -> Any:
        def answer(*arguments: Any, **options: Any) -> Any:
            answers["calls"].append((entry, arguments, options))
            return answers[entry]

        return answer

    for module in ("node", "coordinator", "devnet", "demo"):
        monkeypatch.setattr(f"lumaris.cli.{module}.load", load)
    return answers


_DEVNET = {
    "state": "/x",
    "coordinator": {"url": "http://127.0.0.1:1", "pid": 1, "alive": True},
    "sellers": [{"peer": parties.SELLER.peer_id, "pid": 2, "alive": False, "state": "/x/1"}],
    "buyer": {"state": "/x/buyer"},
}


def test_devnet(parts: dict[str, Any]) -> None:
    parts |= {"lumaris.testing.devnet:up": _DEVNET, "lumaris.testing.devnet:status": _DEVNET}
    parts["lumaris.testing.devnet:down"] = {"ended": 2, "state": "/x"}
    up = call("devnet", "up", "--state", "/x", "--sellers", "1", "--tier", "wasm")
    assert up.exit_code == 0
    assert "export LUMARIS_STATE=/x/buyer" in up.stderr
    assert parts["calls"][0][1] == (Path("/x"), 1)
    assert "seller 1     2    no" in up.stdout
    assert json_of(call("devnet", "status", "--json")) == _DEVNET
    assert call("devnet", "down").stdout == "stopped\n"
    assert json_of(call("--json", "devnet", "down"))["ended"] == 2


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"equal": True, "left_behind": []}, 0),
        ({"equal": False, "left_behind": []}, 1),
        ({"equal": True, "left_behind": ["/x"]}, 1),
    ],
)
def test_demo(parts: dict[str, Any], record: dict[str, Any], code: int) -> None:
    parts["lumaris.testing.demo:run_demo"] = record
    found = call("demo", "--json", "--keep")
    assert found.exit_code == code
    assert json_of(found) == record
    assert parts["calls"][0][1][:2] == (None, True)
    assert call("demo").exit_code == code


def test_node(parts: dict[str, Any], tmp_path: Path) -> None:
    status: dict[str, Any] = {"status": "Selling: 0 sessions.", "peer": "12D3", "uptime_s": 61}
    status |= {"free": {"memory_bytes": 1 << 30}, "addresses": [], "earned_nanos": 5}
    parts |= {"lumaris_node.cli:status": dict(status), "lumaris_node.cli:down": None}
    parts["lumaris_node.cli:run"] = None
    assert json_of(call("node", "status", "--json", "--state", tmp_path)) == status
    shown = call("node", "status", "--state", tmp_path).stdout
    assert shown.startswith("Selling: 0 sessions.\n")
    assert "memory_bytes 1 GiB" in shown
    assert "0.000000005" in shown
    assert call("node", "down", "--state", tmp_path).stdout == "stopped\n"
    up = call("node", "up", "--state", tmp_path, "--region", "eu", "--coordinator", "http://c")
    assert up.exit_code == 0
    options: dict[str, Any] = {"coordinator": "http://c", "coordinator_ca": None, "listen": None}
    options |= {"region": "eu", "log_level": None}
    assert parts["calls"][-1] == ("lumaris_node.cli:run", (tmp_path,), options)


def test_coordinator(parts: dict[str, Any], tmp_path: Path) -> None:
    parts["lumaris_coordinator.config:Settings"] = SimpleNamespace(network="devnet")
    parts["lumaris_coordinator.upkeep.config_file:read"] = {"fee_bps": 7, "network": "devnet"}
    parts["lumaris_coordinator.cli:run"] = None
    parts["lumaris_coordinator.upkeep.folder:require_owner"] = None
    parts["lumaris_coordinator.upkeep.commands:place"] = "a file"
    words = ["--fee-bps", "0", "--settle-window", "1h", "--test-credit", "5", "--port", "0"]
    assert call("coordinator", "up", "--state", tmp_path, *words).exit_code == 0
    made = next(call for call in parts["calls"] if call[0] == "lumaris_coordinator.config:Settings")
    assert made[2] == {
        "state": tmp_path,
        "overlay": True,
        "port": 0,
        "network": "devnet",
        "fee_bps": 0,
        "settle_window_s": 3600,
        "test_credit_nanos": 5_000_000_000,
    }


def test_json_is_plain_ascii(market: Market) -> None:
    market.results = [_result(stdout="\u202e\x9b".encode())]
    found = call("run", "--json", _IMAGE, "python")
    assert found.stdout.isascii()
    assert json.loads(found.stdout)["stdout"] == "\u202e\x9b"
