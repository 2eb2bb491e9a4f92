"""`lumaris job`: what this buyer ran and runs. The past comes from its own records."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli import live
from lumaris.cli.options import CONTEXT, Settings, buyer_options, local_options
from lumaris.cli.output import (
    GuestOutput,
    clean,
    credits_of,
    date_of,
    emit,
    fields,
    peer_of,
    size_of,
    table,
    time_of,
)
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN

if TYPE_CHECKING:
    from lumaris.store import Store

_COLUMNS_MAX = 10_000
_READ_BYTES = 65_536


@click.group("job", context_settings=CONTEXT)
def job() -> None:
    """Look at jobs, and reach into those that run."""


@job.command("ls")
@click.option("--count", "-n", type=click.IntRange(1, _COLUMNS_MAX), default=20, show_default=True)
@local_options
@click.pass_obj
def list_jobs(settings: Settings, count: int) -> None:
    """List jobs, the newest first."""
    from lumaris.cli.local import read_store, state_folder

    async def read(store: Store) -> list[dict[str, Any]]:
        await store.end_orphan_jobs(now=time.time())
        return await store.jobs(count)

    rows = read_store(state_folder(settings), read) or []
    if settings.json:
        emit({"items": [_job_json(row) for row in rows]})
        return
    table(
        (
            "JOB",
            "STATE",
            "REASON",
            "SELLER",
            "WALL",
            "CPU",
            "MEMORY",
            "COST",
            "STARTED",
            "COMMAND",
        ),
        [
            (
                row["job"],
                row["state"] or "",
                row["reason"] or "",
                peer_of(row["seller"] or ""),
                time_of((row["wall_ms"] or 0) / 1000),
                time_of((row["cpu_ms"] or 0) / 1000),
                size_of(row["memory_peak_bytes"] or 0),
                _cost(row) or "-",
                date_of(row["created_at"]),
                _short(_command(row)),
            )
            for row in rows
        ],
    )


@job.command("show")
@click.argument("job_id", metavar="JOB")
@local_options
@click.pass_obj
def show(settings: Settings, job_id: str) -> None:
    """Show one job: where it ran, how it ended, what it cost."""
    row = _find(settings, job_id)
    if settings.json:
        emit(_job_json(row))
        return
    shown = [
        ("job", row["job"]),
        ("state", row["state"]),
        ("reason", row["reason"] or ""),
        ("detail", row["detail"] or ""),
        ("exit", "" if row["exit_status"] is None else row["exit_status"]),
        ("image", row["image"]),
        ("command", " ".join(_command(row))),
        ("seller", row["seller"]),
        ("session", row["session"]),
        ("attempts", row["attempts"]),
        ("started", date_of(row["created_at"])),
        ("ended", date_of(row["ended_at"])),
        ("wall", time_of((row["wall_ms"] or 0) / 1000)),
        ("cpu", time_of((row["cpu_ms"] or 0) / 1000)),
        ("memory", size_of(row["memory_peak_bytes"] or 0)),
        ("cost", _cost(row) or "- (known when its session is settled)"),
        ("files", _folder(settings, row["job"])),
    ]
    fields([(name, value) for name, value in shown if value not in ("", None)])


@job.command("logs")
@click.argument("job_id", metavar="JOB")
@click.option("--follow", "-f", is_flag=True, help="Go on until a running job has ended.")
@buyer_options
@click.pass_obj
def logs(settings: Settings, job_id: str, follow: bool) -> None:
    """Print what a job printed: its stdout on ours, its stderr on ours.

    Without -f nobody is contacted: of a running job it is what has arrived so far.
    """
    row = _find(settings, job_id)
    folder = _folder(settings, row["job"])
    if follow and not settings.json:
        live.follow(settings, row["job"], folder)
        return
    if follow:
        live.wait(settings, row["job"])
    if settings.json:
        texts = {name: _read(folder / name) for name in ("stdout", "stderr")}
        emit({"job": row["job"], **texts})
        return
    output = GuestOutput()
    for name in ("stdout", "stderr"):
        try:
            with (folder / name).open("rb") as file:
                while data := file.read(_READ_BYTES):
                    output.write(name, data)
        except FileNotFoundError:
            continue
    sys.stdout.flush()


for command in (live.exec_command, live.shell, live.forward, live.stdin, live.cancel):
    job.add_command(command)


def _find(settings: Settings, job_id: str) -> dict[str, Any]:
    from lumaris.cli.local import read_store, state_folder

    async def read(store: Store) -> dict[str, Any] | None:
        await store.end_orphan_jobs(now=time.time())
        return await store.job(job_id)

    row = None
    # The id becomes a path for the logs, so it must be one of ours before anything else.
    if re.match(ID_PATTERN, job_id) and job_id.startswith("job_"):
        row = read_store(state_folder(settings), read)
    if row is None:
        raise LumarisError(
            "not_found",
            f"There is no job {clean(job_id[:80])!r} here.",
            hint="`lumaris job ls` lists jobs; --state names another folder.",
        )
    return row


def _folder(settings: Settings, job_id: str) -> Path:
    from lumaris.cli.local import state_folder

    return state_folder(settings) / "jobs" / job_id


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _command(row: dict[str, Any]) -> list[str]:
    try:
        return [str(word) for word in json.loads(row["command"] or "[]")]
    except ValueError:
        return []


def _job_json(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "command": _command(row), "cost": _cost(row)}


def _cost(row: dict[str, Any]) -> str | None:
    """What a job cost in credits; None while that is not known."""
    return None if row["cost_nanos"] is None else credits_of(row["cost_nanos"])


def _short(command: list[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 40 else f"{text[:37]}..."
