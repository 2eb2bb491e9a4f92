"""`lumaris coordinator`: operate one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from lumaris.cli.coordinator_keys import keys, operator, user
from lumaris.cli.options import CONTEXT, SECONDS, Settings, load, plain_options
from lumaris.cli.output import emit, note
from lumaris_protocol.errors import LumarisError

F = TypeVar("F", bound=Callable[..., Any])

_PORT: Final = 24_480
# An address with a password belongs neither on a command line nor in a process list.
_DATABASE: Final = "LUMARIS_COORDINATOR_DATABASE"
_UPKEEP: Final = "lumaris_coordinator.upkeep"

state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of its keys, its configuration and its data.",
)
file_argument = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


def terms_options(command: F) -> F:
    """What an operator chooses when a coordinator is made or started."""
    for option in reversed(
        (
            click.option("--host", help="Address to listen on.  [default: 127.0.0.1]"),
            click.option(
                "--port", type=click.IntRange(0, 65_535), help=f"[default: {_PORT}; 0: any]"
            ),
            click.option(
                "--network", help="Name of the network; a folder keeps that of its first start."
            ),
            click.option(
                "--fee-bps", type=click.IntRange(0, 10_000), help="Fee in hundredths of a per cent."
            ),
            click.option(
                "--settle-window", type=SECONDS, help="How long sellers may settle, such as 30d."
            ),
            click.option(
                "--test-credit", metavar="CREDITS", help="Test credit an account may get."
            ),
            click.option(
                "--shard-map",
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="FILE",
                help="JSON file that divides the market.",
            ),
            click.option(
                "--tls-name",
                "tls_names",
                multiple=True,
                metavar="HOST",
                help="Serve HTTPS under this name or IP address; repeatable.",
            ),
            click.option(
                "--mutual-tls/--no-mutual-tls",
                default=None,
                help="Whether callers need a certificate of the coordinator's own authority.",
            ),
            click.option(
                "--overlay/--no-overlay",
                default=None,
                help="Be a peer of the overlay.  [default: where the p2p extra is installed]",
            ),
            click.option(
                "--overlay-listen", metavar="IP:PORT", help="Where its peer listens; port 0: any."
            ),
        )
    ):
        command = option(command)
    return command


@click.group("coordinator", context_settings=CONTEXT)
def coordinator() -> None:
    """Operate a coordinator.

    Its data is a file in the folder, or the PostgreSQL database that the setting `database` or the
    environment's LUMARIS_COORDINATOR_DATABASE names.
    """


coordinator.add_command(keys)
coordinator.add_command(operator)
coordinator.add_command(user)


@coordinator.command("init")
@state_option
@terms_options
@click.option(
    "--database",
    metavar="ADDRESS",
    help="postgresql://… without a password: name a passfile in it.  [default: a file in DIR]",
)
@plain_options
@click.pass_obj
def init(settings: Settings, /, state: Path | None, **terms: Any) -> None:
    """Make a folder with its configuration, keys and an empty database.

    From then on the folder is used with that network and that database only.
    """
    folder = _folder(settings, state)
    initialise: Any = load(f"{_UPKEEP}.config_file:initialise", extra="coordinator")
    chosen = _chosen(terms)
    if (network := chosen.get("network") or _kept(folder).get("network")) is None:
        raise LumarisError(
            "usage",
            "A new coordinator needs a name for its network: --network NAME.",
            hint="It stands in everything that is signed, and can never be changed.",
        )
    file = initialise(folder, {**chosen, "network": network})
    try:
        peer = _command("prepare")(_told(_settings(folder, {})))
    except LumarisError:
        file.unlink()  # so that the same command can be given again
        raise
    if settings.json:
        emit({"state": str(folder), "config": str(file), "coordinator": peer})
        return
    click.echo(f"coordinator {peer} in {folder}")
    note(f"network: {network}, for ever")
    note(f"settings: {file}")
    note(f"start it: lumaris coordinator up --state {folder}")
    if terms.get("tls_names"):
        note(f"give {folder}/tls/ca.pem to everybody: whoever calls has to trust it")
    note(f"its keys are in {folder}: keep a copy apart from the backups, and the root key offline")


@coordinator.command("up")
@state_option
@terms_options
@plain_options
@click.pass_obj
def up(settings: Settings, /, state: Path | None, **terms: Any) -> None:
    """Serve until Ctrl-C. Prints `ready PEER URL` once requests are answered.

    Reads coordinator.toml in the folder; options win over it. A folder is of the network that its
    first start named, or of devnet.
    """
    folder = _folder(settings, state)
    if terms["network"] is None and "network" not in _kept(folder):
        note("no network was named: this folder is of devnet from now on")
    run: Any = load("lumaris_coordinator.cli:run", extra="coordinator")
    p2p = find_spec("libp2p") is not None
    chosen = _settings(folder, _chosen(terms), port=_PORT, overlay=p2p)
    note(f"coordinating {chosen.network} from {folder}; stop with Ctrl-C")
    run(_told(chosen))


@coordinator.command("migrate")
@state_option
@plain_options
@click.pass_obj
def migrate(settings: Settings, state: Path | None) -> None:
    """Bring the database to this version. `up` does it as well."""
    done = _command("migrate")(chosen_settings(settings, state))
    if settings.json:
        emit({"applied": done})
        return
    click.echo("\n".join(done) if done else "up to date")


@coordinator.command("backup")
@file_argument
@state_option
@plain_options
@click.pass_obj
def backup(settings: Settings, file: Path, state: Path | None) -> None:
    """Write all data to a new FILE while the coordinator serves. The keys are not in it."""
    _tell(settings, _command("backup")(chosen_settings(settings, state), file))


@coordinator.command("restore")
@file_argument
@state_option
@plain_options
@click.pass_obj
def restore(settings: Settings, file: Path, state: Path | None) -> None:
    """Read a backup into an empty folder or database, then check it.

    Put the keys of the coordinator and its coordinator.toml into the folder first. What comes back
    is frozen, and every token has ended.
    """
    summary, report = _command("restore")(chosen_settings(settings, state), file)
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(summary.head.made_at))
    note(f"frozen; what was taken away after {made} is back: look again at API keys, operators,")
    note("revoked peers, passwords and payouts, then: lumaris coordinator freeze off")
    _tell(settings, summary, check=report)


@coordinator.command("check")
@state_option
@plain_options
@click.pass_obj
def check(settings: Settings, state: Path | None) -> None:
    """Recompute the ledger and the receipts log. Exits with 1 when something is wrong."""
    report = _command("check")(chosen_settings(settings, state))
    if settings.json:
        emit(_report(report))
    else:
        for problem in report.problems:
            click.echo(problem)
        note(_counted(report))
    if not report.sound:
        raise SystemExit(1)


@coordinator.command("freeze")
@click.argument("switch", type=click.Choice(["on", "off"]), required=False)
@state_option
@plain_options
@click.pass_obj
def freeze(settings: Settings, switch: str | None, state: Path | None) -> None:
    """Stop new grants, credits and payouts, or take them again; settlements go on.

    Without a word it only says how the switch stands.
    """
    wanted = None if switch is None else switch == "on"
    frozen = _command("freeze")(chosen_settings(settings, state), wanted)
    if settings.json:
        emit({"frozen": frozen})
        return
    click.echo("on" if frozen else "off")


def _command(name: str) -> Any:
    return load(f"{_UPKEEP}.commands:{name}", extra="coordinator")


def _folder(settings: Settings, state: Path | None) -> Path:
    folder = state or settings.state
    if folder is None:
        raise LumarisError("usage", "Say where its keys and data are: --state DIR.")
    require_owner: Any = load(f"{_UPKEEP}.folder:require_owner", extra="coordinator")
    require_owner(folder)
    return folder


def chosen_settings(settings: Settings, state: Path | None, *, data: bool = True) -> Any:
    """The settings of the folder that a command is for; with `data` the database is told."""
    found = _settings(_folder(settings, state), {})
    return _told(found) if data else found


def _told(chosen: Any) -> Any:
    """A command that works on another database than its user thinks must be seen to do so."""
    note(f"database: {_command('place')(chosen)}")
    return chosen


def _settings(folder: Path, chosen: dict[str, Any], **defaults: Any) -> Any:
    """The file's settings, under those of the environment and the command line."""
    kind: Any = load("lumaris_coordinator.config:Settings", extra="coordinator")
    database = {"database": address} if (address := os.environ.get(_DATABASE)) else {}
    return kind(state=folder, **{**defaults, **_kept(folder), **database, **chosen})


def _kept(folder: Path) -> dict[str, Any]:
    """The folder's network and the settings of its file."""
    read: Any = load(f"{_UPKEEP}.config_file:read", extra="coordinator")
    found: dict[str, Any] = read(folder)
    return found


def _chosen(terms: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, by the names of the settings."""
    renamed = {
        "settle_window": "settle_window_s",
        "test_credit": "test_credit_nanos",
    }
    given = {
        renamed.get(name, name): value
        for name, value in terms.items()
        if value is not None and value != ()
    }
    if "test_credit_nanos" in given:
        given["test_credit_nanos"] = _nanos(given["test_credit_nanos"])
    return given


def _nanos(text: str) -> int:
    from lumaris_protocol.money import parse_credits

    try:
        return parse_credits(text)
    except ValueError as error:
        raise LumarisError("usage", f"--test-credit: {error}.") from None


def _tell(settings: Settings, summary: Any, check: Any = None) -> None:
    head = summary.head
    if settings.json:
        found = {
            "network": head.network,
            "coordinator": head.coordinator,
            "made_at": head.made_at,
            "log_size": head.log_size,
            "rows": summary.rows,
            "sha256": summary.sha256,
        }
        emit(found if check is None else {**found, "check": _report(check)})
    else:
        click.echo(f"{summary.rows} rows, {head.log_size} leaves in the log, {summary.sha256}")
        for problem in check.problems if check else ():
            click.echo(problem)
    if check is not None and not check.sound:
        raise SystemExit(1)


def _report(report: Any) -> dict[str, Any]:
    return {
        "sound": report.sound,
        "accounts": report.accounts,
        "transfers": report.transfers,
        "escrows": report.escrows,
        "log_size": report.log_size,
        "problems": list(report.problems),
    }


def _counted(report: Any) -> str:
    return (
        f"{report.accounts} accounts, {report.transfers} transfers, {report.escrows} escrows and"
        f" {report.log_size} leaves: {'sound' if report.sound else 'NOT SOUND'}"
    )
