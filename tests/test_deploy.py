"""What is deployed fits what is there: files parse, names exist, the units are hardened."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from lumaris.cli.options import Settings as Options
from lumaris.cli.root import root
from lumaris_coordinator.cli import DATABASE_ENV
from lumaris_coordinator.tls import OPEN
from lumaris_protocol.codes import CODES
from tests.coordinator.builders import Market
from tests.coordinator.conftest import database, market, postgres_server

__all__ = ["database", "market", "postgres_server"]

yaml: Any = importlib.import_module("yaml")  # it brings no types

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
OPERATING = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
# What Prometheus itself says of a target.
_NOT_OURS = {"up"}
_METRIC = re.compile(r"\b(lumaris_[a-z0-9_]+)")


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def parse_command(words: list[str]) -> None:
    """Parse a command line of `lumaris` without running it. Raises click.UsageError."""
    command: click.Command = root
    context = command.make_context("lumaris", list(words), obj=Options())
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert name is not None
        assert found is not None
        command = found
        context = command.make_context(name, rest, parent=context)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("prometheus/alerts.yaml")["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana/coordinator.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*found, *(rule["expr"] for rule in alerts())]


async def test_every_metric_that_is_watched_exists(market: Market) -> None:
    assert (await market.client.get("/v1/info")).status_code == 200
    text = (await market.client.get("/metrics")).text
    told = {line.partition("{")[0].split(" ")[0] for line in text.splitlines() if line[:1] != "#"}
    named = {name for expression in expressions() for name in _METRIC.findall(expression)}
    assert named - told == set()
    assert len(named) > 15
    plain = {
        name
        for rule in alerts()
        for name in re.findall(r"^[a-z_]+", rule["expr"])
        if not name.startswith(("lumaris_", "sum", "increase", "histogram"))
    }
    assert plain == _NOT_OURS


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "warn", "info")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["runbook"] == f"docs/operating.md#{rule['alert'].lower()}"
    sections = re.findall(r"^### (\w+)$", OPERATING, re.MULTILINE)
    assert sorted(sections) == sorted(names)


def test_prometheus_reads_the_rules() -> None:
    config = load("prometheus/prometheus.yaml")
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])
    jobs = {job["job_name"]: job["metrics_path"] for job in config["scrape_configs"]}
    assert jobs == {"lumaris-coordinator": "/metrics"}
    used = {job for rule in alerts() for job in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert used == set(jobs)
    text = (DEPLOY / "prometheus/prometheus.yaml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(re.sub(r"^    # (\w+: )", r"    \1", text, flags=re.M))[
        "scrape_configs"
    ]
    assert {"scheme", "tls_config", "authorization"} < job.keys()


def test_the_handbook_names_what_needs_no_client_certificate() -> None:
    assert {path for path in OPEN if not path.startswith("/v1/identity/")} < set(
        re.findall(r"`(/[^`]+)`", OPERATING)
    )


def test_the_dashboard_is_whole() -> None:
    board = json.loads((DEPLOY / "grafana/coordinator.json").read_text(encoding="utf-8"))
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"


def test_compose_holds_no_secret_and_grants_nothing() -> None:
    config = load("compose.yaml")
    coordinator, base = config["services"]["coordinator"], config["services"]["database"]
    assert coordinator["read_only"] is True
    assert coordinator["user"].split(":")[0] not in ("0", "root")
    for service in (coordinator, base):
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "healthcheck" in service
    assert not [name for name in ("cap_add", "devices") if name in coordinator]
    # Only this machine may reach it, and nobody the database.
    assert all(port.startswith("127.0.0.1:") for port in coordinator["ports"])
    assert "ports" not in base
    secrets = config["secrets"]
    assert {name for service in (coordinator, base) for name in service["secrets"]} == set(secrets)
    assert all(secret["file"].startswith("./secrets/") for secret in secrets.values())
    ignored = (DEPLOY / "secrets/.gitignore").read_text(encoding="utf-8")
    assert "*" in ignored.splitlines()
    mounted = {volume.split(":")[0] for s in (coordinator, base) for volume in s["volumes"]}
    assert mounted == set(config["volumes"])


def test_compose_says_what_the_program_understands() -> None:
    coordinator = load("compose.yaml")["services"]["coordinator"]
    parse_command(["coordinator", *coordinator["command"]])
    assert set(coordinator["environment"]) == {DATABASE_ENV}
    address = coordinator["environment"][DATABASE_ENV]
    postgres = importlib.import_module("lumaris_coordinator.store.postgres")
    assert postgres.checked(address) == address
    assert "password" not in address
    port = coordinator["command"][coordinator["command"].index("--port") + 1]
    assert coordinator["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert any(f":{port}/readyz" in word for word in coordinator["healthcheck"]["test"])


def test_the_image_starts_the_program_as_nobody() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and line[0].isalpha()]
    final = lines[max(n for n, line in enumerate(lines) if line[0] == "FROM") :]
    found = {word: rest for word, rest in final if word in ("USER", "ENTRYPOINT", "CMD")}
    assert found["USER"] == "24480:24480"
    entry, command = json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])
    assert entry[0] == "lumaris"
    parse_command([*entry[1:], *command])
    coordinator = load("compose.yaml")["services"]["coordinator"]
    assert (command, found["USER"]) == (coordinator["command"], coordinator["user"])
    copied = [rest.split()[:-1] for word, rest in lines if word == "COPY" and "--from" not in rest]
    names = [name for group in copied for name in group]
    assert [name for name in names if not (ROOT / name).exists()] == []
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert set(names) == {line[1:] for line in allowed if line.startswith("!")}


def settings_of(unit: Path) -> dict[str, str]:
    lines = unit.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    found: dict[str, str] = {}
    for name, value in pairs:
        found[name] = f"{found[name]} {value}" if name in found else value
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_confined_and_runs_what_there_is(unit: Path) -> None:
    found = settings_of(unit)
    program, *words = shlex.split(found["ExecStart"])
    assert program == "/opt/lumaris/bin/lumaris"
    parse_command(words)
    user = found["User"]
    users = (DEPLOY / "systemd/lumaris.sysusers").read_text(encoding="utf-8")
    assert re.search(rf"^u {user} ", users, re.MULTILINE)
    assert f"/var/lib/{found['StateDirectory']}" in found["ExecStart"]
    wanted = {
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "StateDirectoryMode": "0700",
        "UMask": "0077",
    }
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze (Debian package systemd)")
    # It looks for the program as well, which is installed elsewhere here.
    text = unit.read_text(encoding="utf-8").replace("/opt/lumaris/bin/lumaris", "/bin/true")
    copy = tmp_path / unit.name
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [program, "verify", "--man=no", str(copy)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_outlasts_a_database_that_is_away_and_stops_where_a_person_is_needed() -> None:
    text = (DEPLOY / "systemd/lumaris-coordinator.service").read_text(encoding="utf-8")
    assert "\nStartLimitIntervalSec=0\n" in text
    found = re.search(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert found is not None
    final = {int(status) for status in found[1].split()}
    assert final == {
        CODES[code].exit_code for code in ("config_invalid", "log_behind", "unsafe_key_file")
    }
    assert final.isdisjoint(CODES[code].exit_code for code in ("not_writable", "busy"))
