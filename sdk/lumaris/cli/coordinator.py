"""`lumaris coordinator`: operate one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lumaris.cli.options import CONTEXT, SECONDS, Settings, load, plain_options
from lumaris.cli.output import note
from lumaris_protocol.errors import LumarisError


@click.group("coordinator", context_settings=CONTEXT)
def coordinator() -> None:
    """Operate a coordinator."""


@coordinator.command("up")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of its key and database.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65_535), default=24_480, show_default=True)
@click.option("--network", default="devnet", show_default=True)
@click.option("--fee-bps", type=click.IntRange(0, 10_000), help="Fee in hundredths of a per cent.")
@click.option("--settle-window", type=SECONDS, help="How long sellers may settle, such as 30d.")
@click.option("--test-credit", metavar="CREDITS", help="Test credit an account may get.")
@click.option(
    "--shard-map",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="JSON file that divides the market.",
)
@plain_options
@click.pass_obj
def up(
    settings: Settings,
    state: Path | None,
    host: str,
    port: int,
    network: str,
    fee_bps: int | None,
    settle_window: int | None,
    test_credit: str | None,
    shard_map: Path | None,
) -> None:
    """Serve until Ctrl-C. Prints `ready PEER URL` once requests are answered."""
    folder = state or settings.state
    if folder is None:
        raise LumarisError("usage", "Say where its key and database are: --state DIR.")
    run: Any = load("lumaris_coordinator.cli:run", extra="coordinator")
    kind: Any = load("lumaris_coordinator.config:Settings", extra="coordinator")
    chosen = {
        "fee_bps": fee_bps,
        "settle_window_s": settle_window,
        "test_credit_nanos": _nanos(test_credit),
        "shard_map": shard_map,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    note(f"coordinating {network} from {folder}; stop with Ctrl-C")
    run(kind(state=folder, host=host, port=port, network=network, **given))


def _nanos(text: str | None) -> int | None:
    from lumaris_protocol.money import parse_credits

    if text is None:
        return None
    try:
        return parse_credits(text)
    except ValueError as error:
        raise LumarisError("usage", f"--test-credit: {error}.") from None
