"""`lumaris wallet`: balances, asked of the coordinator directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lumaris.cli.options import CONTEXT, Settings, buyer_options
from lumaris.cli.output import credits_of, emit, fields

if TYPE_CHECKING:
    from lumaris_protocol.coordinator_api import Account


@click.group("wallet", context_settings=CONTEXT)
def wallet() -> None:
    """See what you have, and add test credit."""


@wallet.command("show")
@buyer_options
@click.pass_obj
def show(settings: Settings) -> None:
    """Show what is free, held in sessions, and put down in disputes."""
    from lumaris.cli import account

    _print(settings, account.balances(account.profile_of(settings)))


@wallet.command("deposit")
@click.argument("amount")
@buyer_options
@click.pass_obj
def deposit(settings: Settings, amount: str) -> None:
    """Get AMOUNT of test credit, from a coordinator that gives it."""
    from lumaris.cli import account
    from lumaris.client import parse_amount

    nanos = parse_amount(amount, "AMOUNT")
    _print(settings, account.deposit_test_credit(account.profile_of(settings), nanos))


@wallet.command("payout")
@click.argument("amount")
@click.option("--adapter", default="test-credit", show_default=True, help="Who pays it out.")
@buyer_options
@click.pass_obj
def payout(settings: Settings, amount: str, adapter: str) -> None:
    """Take AMOUNT out of the market; it leaves the balance at once."""
    from lumaris.cli import account
    from lumaris.client import parse_amount

    nanos = parse_amount(amount, "AMOUNT")
    found = account.request_payout(account.profile_of(settings), nanos, adapter=adapter)
    if settings.json:
        emit(
            {
                "payout": found.payout,
                "adapter": found.adapter,
                "currency": found.currency,
                "amount_nanos": found.amount_nanos,
                "amount": credits_of(found.amount_nanos),
                "state": found.state,
            }
        )
        return
    fields(
        [
            ("payout", found.payout),
            ("amount", f"{credits_of(found.amount_nanos)} {found.currency}"),
            ("adapter", found.adapter),
            ("state", found.state),
        ]
    )


def _print(settings: Settings, found: Account) -> None:
    if settings.json:
        emit(
            {
                "account": found.account,
                "peer": found.peer,
                "currency": found.currency,
                "free_nanos": found.free_nanos,
                "held_nanos": found.held_nanos,
                "free": credits_of(found.free_nanos),
                "held": credits_of(found.held_nanos),
                "disputed_nanos": found.disputed_nanos,
                "disputed": credits_of(found.disputed_nanos),
            }
        )
        return
    fields(
        [
            ("free", f"{credits_of(found.free_nanos)} {found.currency}"),
            ("held", f"{credits_of(found.held_nanos)} {found.currency}"),
            ("in disputes", f"{credits_of(found.disputed_nanos)} {found.currency}"),
            ("account", found.account),
            ("peer", found.peer),
        ]
    )
