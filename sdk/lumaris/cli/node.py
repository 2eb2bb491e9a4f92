"""`lumaris node`: sell from this machine."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from lumaris.cli.image import image
from lumaris.cli.options import CONTEXT, Settings, coordinator_option, load, plain_options
from lumaris.cli.output import clean, credits_of, emit, fields, note, size_of, table, time_of

_PART = "lumaris_node.cli"
_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The node's folder: its key, node.toml and records.",
)


@click.group("node", context_settings=CONTEXT)
def node() -> None:
    """Sell from this machine."""


node.add_command(image)


@node.command("up")
@_state
@click.option("--listen", metavar="IP:PORT", help="Where peers reach this node.")
@click.option("--region", help="The region to advertise, such as eu-de.")
@coordinator_option
@plain_options
@click.pass_obj
def up(settings: Settings, state: Path | None, listen: str | None, region: str | None) -> None:
    """Sell until Ctrl-C or `lumaris node down`.

    Prints `ready PEER ADDRESS` once buyers can see it. What is shared, and at which price, stands
    in node.toml in the state folder.
    """
    run = _load("run")
    folder = folder_of(settings, state)
    note(f"selling from {folder}; stop with Ctrl-C or `lumaris node down`")
    level = "debug" if settings.debug else None
    coordinator = settings.coordinator or os.environ.get("LUMARIS_COORDINATOR_URL") or None
    run(
        folder,
        coordinator=coordinator,
        coordinator_ca=os.environ.get("LUMARIS_CA_FILE") or None,
        listen=listen,
        region=region,
        log_level=level,
    )


@node.command("status")
@_state
@plain_options
@click.pass_obj
def status(settings: Settings, state: Path | None) -> None:
    """Show what the node on this machine does."""
    found: dict[str, Any] = _load("status")(folder_of(settings, state))
    if settings.json:
        emit(found)
        return
    click.echo(found.pop("status", "Selling."))
    tiers = found.pop("tiers", [])
    found["images"] = f"{len(found.get('images', ()))} ready, those of the catalog too"
    fields([(name.removesuffix("_nanos"), _text(name, value)) for name, value in found.items()])
    _print_tiers(tiers)


@node.command("down")
@_state
@plain_options
@click.pass_obj
def down(settings: Settings, state: Path | None) -> None:
    """Stop the node on this machine; sessions end with their money kept."""
    folder = folder_of(settings, state)
    _load("down")(folder)
    if settings.json:
        emit({"stopped": True, "state": str(folder)})
    else:
        click.echo("stopped")


@node.command("pause")
@_state
@plain_options
@click.pass_obj
def pause(settings: Settings, state: Path | None) -> None:
    """Take this machine back for now: freeze every job, sell nothing.

    Their clocks and bills stop. Jobs that are not resumed within ten minutes end.
    """
    _tell(settings, _load("pause")(folder_of(settings, state)))


@node.command("resume")
@_state
@plain_options
@click.pass_obj
def resume(settings: Settings, state: Path | None) -> None:
    """Let frozen jobs go on, and sell again."""
    _tell(settings, _load("resume")(folder_of(settings, state)))


def _tell(settings: Settings, found: dict[str, Any]) -> None:
    if settings.json:
        emit(found)
    else:
        click.echo(found["status"])


@node.command("selftest")
@_state
@click.option(
    "--tier",
    type=click.Choice(["wasm", "process", "container", "vm"]),
    help="Only this one; else all that node.toml accepts.",
)
@plain_options
@click.pass_obj
def selftest(settings: Settings, state: Path | None, tier: str | None) -> int:
    """Attack this machine's sandboxes from inside, and show what they held off.

    The node runs the same before it offers a tier, and daily. It need not run for this; the command
    needs the same rights. Exits with 1 when a tier did not hold, or none could be tested; a tier
    that this machine cannot have counts only when it is named.
    """
    found: list[dict[str, Any]] = _load("selftest")(folder_of(settings, state), tier)
    counted = [one for one in found if tier or one.get("code") != "tier_unavailable"]
    failed = not counted or not all(report["held"] for report in counted)
    if settings.json:
        emit({"held": not failed, "tiers": found})
        return int(failed)
    for report in found:
        _print_report(report)
        _print_difference(report)
    return int(failed)


def _print_report(report: dict[str, Any]) -> None:
    if report["held"] is None:
        note(f"{report['tier']}: not tested: {report['why']}")
        return
    marks = {(True, True): "held", (False, True): "FAILED"}
    rows = [
        [
            row["name"],
            marks.get((row["held"], row["counts"]), "open") if row["shown"] else "not shown",
            clean(row["detail"]),
        ]
        for row in report["rows"]
        if not row["held"] or row["counts"]
    ]
    table([f"{report['tier']}: {report['assurance']}".upper(), "RESULT", "DETAIL"], rows)
    verdict = "offered" if report["held"] else "not offered"
    note(
        f"{report['tier']} is {verdict}: {len(report['rows'])} attacks of suite {report['suite']}"
        f" on {report['version']} in {report['seconds']:.1f} s"
    )


def _print_difference(report: dict[str, Any]) -> None:
    if report.get("node_offers") is not None:
        does = "offers" if report["node_offers"] else "does not offer"
        note(f"the running node {does} {report['tier']}; it was asked to test again")


def _print_tiers(tiers: list[dict[str, Any]]) -> None:
    rows = []
    for tier in tiers:
        if not tier["offered"]:
            rows.append([tier["tier"], "no", "-", "-", clean(tier["why_not"])])
            continue
        tested = datetime.fromtimestamp(tier["tested_at"]).astimezone().isoformat(" ", "minutes")
        rows.append(
            [
                tier["tier"],
                "yes",
                clean(tier["assurance"]),
                f"suite {tier['suite']}, {tested}" if tier["tested_at"] else "-",
                " ".join(tier["features"]),
            ]
        )
    table(["TIER", "OFFERED", "ASSURANCE", "TESTED", "FEATURES OR WHY NOT"], rows)


def _load(name: str) -> Any:
    return load(f"{_PART}:{name}", extra="node")


def folder_of(settings: Settings, state: Path | None) -> Path:
    """The node's folder."""
    if state is not None or settings.state is not None:
        return Path(state or settings.state or ".")
    import platformdirs

    return Path(platformdirs.user_data_dir("lumaris")) / "node"


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_text("", item) for item in value) or "-"
    if isinstance(value, int) and not isinstance(value, bool):
        if name.endswith("_nanos"):
            return credits_of(value)
        if name.endswith("_bytes"):
            return size_of(value)
        if name.endswith("_s"):
            return time_of(value)
    return str(value)
