"""The command's root: its tables of commands, and the one place where an error becomes a message.

Nothing here imports trio, msgspec, httpx or rich: `lumaris --help` must stay quick, and a test
holds it to that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from lumaris import __version__
from lumaris.cli import errors
from lumaris.cli.options import (
    CONTEXT,
    LazyGroup,
    Settings,
    coordinator_option,
    debug_option,
    json_option,
    state_option,
)

COMMANDS: Final = {
    "demo": ("lumaris.cli.demo:demo", "Run a whole market on this machine, with real jobs."),
    "run": ("lumaris.cli.run:run", "Run a command on a seller's machine."),
    "map": ("lumaris.cli.map:map_files", "Run a command once for each of many files."),
    "offers": ("lumaris.cli.offers:offers", "List sellers with their capacity and prices."),
    "job": ("lumaris.cli.job:job", "Look at jobs, and reach into those that run."),
    "wallet": ("lumaris.cli.wallet:wallet", "See what you have, and add test credit."),
    "user": ("lumaris.cli.user:user", "Say whose this peer is, with a user's API key."),
    "receipt": ("lumaris.cli.receipt:receipt", "Show, save and verify receipts."),
    "dispute": ("lumaris.cli.dispute:dispute", "Dispute what was sold or paid, and answer."),
    "verify": (
        "lumaris.cli.verify:verify",
        "Replay a ruling from its file, without asking anyone.",
    ),
    "daemon": (
        "lumaris.cli.daemon:daemon",
        "Keep this machine on the network between commands.",
    ),
    "netcheck": ("lumaris.cli.net:netcheck", "Show who can reach this machine, and how."),
    "ping": ("lumaris.cli.net:ping", "Ask a peer whether it is there, and for its time."),
    "challenge": (
        "lumaris.cli.challenge:challenge",
        "Have a seller prove its cores or memory.",
    ),
    "node": ("lumaris.cli.node:node", "Sell from this machine."),
    "coordinator": ("lumaris.cli.coordinator:coordinator", "Operate a coordinator."),
    "devnet": ("lumaris.cli.devnet:devnet", "Keep a market on this machine to try things on."),
}


class Root(LazyGroup):
    """The root group. Every failure below it leaves as one message and one exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit, or return its exit code when not `standalone_mode`."""
        arguments = list(sys.argv[1:] if args is None else args)
        settings = extra.setdefault("obj", Settings())
        try:
            code = super().main(
                arguments,
                prog_name or "lumaris",
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except SystemExit:
            raise
        except BaseException as error:
            settings.json = settings.json or "--json" in arguments
            code = errors.report(error, settings)
        code = code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


@click.group(
    "lumaris",
    cls=Root,
    entries=COMMANDS,
    context_settings={**CONTEXT, "max_content_width": 100},
    epilog="Every command has its own --help. Exit codes: 0 ok, 1 error, 2 usage, 3 job failed,"
    " 4 identity, 5 not found, 6 no offers, 7 budget, 8 time-out, 9 verification, 10 unreachable,"
    " 125 failure of ours in a run, 130 interrupted.",
)
@state_option
@coordinator_option
@json_option
@debug_option
@click.version_option(__version__, message="lumaris %(version)s")
@click.pass_obj
def root(settings: Settings) -> None:
    """Rent compute from strangers, directly, with receipts anyone can check."""
    errors.set_up_logs(settings)


def main() -> None:
    """The console script."""
    root.main()
