"""`lumaris receipt`: receipts as files, and whether they hold. All of it works offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lumaris.cli.options import CONTEXT, Settings, local_options
from lumaris.cli.output import clean, credits_of, date_of, emit, fields, note, shape, table
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN

if TYPE_CHECKING:
    from lumaris_protocol.messages.receipt import Receipt
    from lumaris_protocol.receipts import Report

_EXIT: Final = {"valid": 0, "invalid": 1, "unknown": 2}
_SENTENCE: Final = {
    "valid": "valid: every check holds",
    "invalid": "invalid: do not rely on this receipt",
    "unknown": "cannot tell: it holds together, but its coordinator's key is not trusted here",
}
_MONEY: Final = ("cap_nanos", "paid_nanos", "seller_nanos", "fee_nanos", "refund_nanos")
_PARTIES: Final = ("receipt", "session", "buyer", "seller", "currency", "outcome", "verification")


@click.group("receipt", context_settings=CONTEXT)
def receipt() -> None:
    """Show, save and verify receipts.

    A receipt is named by a file, or by the id of the receipt, its session or one of its jobs.
    """


@receipt.command("show")
@click.argument("name", metavar="FILE_OR_ID")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the receipt file there, for others to verify.",
)
@local_options
@click.pass_obj
def show(settings: Settings, name: str, out: Path | None) -> None:
    """Show what was held, paid, charged and returned."""
    from lumaris.cli.local import open_receipt

    data = _read(settings, name)
    opened = open_receipt(data)
    if out is not None:
        try:
            out.write_bytes(data)
        except OSError as error:
            raise LumarisError(
                "not_writable", f"{out}: {error.strerror}", hint="Choose another with --out."
            ) from None
    if settings.json:
        emit(_receipt_json(opened))
        return
    _print_receipt(opened)
    if out is not None:
        note(f"saved to {out}; anyone can check it with `lumaris receipt verify {out}`")


@receipt.command("verify")
@click.argument("name", metavar="FILE_OR_ID")
@click.option(
    "--trust",
    multiple=True,
    metavar="PEER",
    help="A coordinator's peer id to trust; repeatable.  [default: the one this buyer uses]",
)
@local_options
@click.pass_obj
def verify(settings: Settings, name: str, trust: tuple[str, ...]) -> int:
    """Check a receipt without asking anyone.

    Exits with 0 when it is valid, 1 when it is not, and 2 when this machine cannot tell: the
    coordinator that signed it is not trusted here, or there is no such receipt.
    """
    from lumaris.cli import errors
    from lumaris_protocol.receipts import verify_bundle

    try:
        trusted = _trusted(settings, trust)
        data = _read(settings, name)
    except LumarisError as error:
        errors.show(error, settings)
        return _EXIT["unknown"]
    report = verify_bundle(data, trusted=trusted)
    if settings.json:
        emit(_report_json(report))
    else:
        _print_report(report)
    return _EXIT[report.verdict]


def _read(settings: Settings, name: str) -> bytes:
    """A receipt file's bytes, never more than one may have. Raises LumarisError `not_found`."""
    from lumaris.cli.local import read_store, state_folder
    from lumaris_protocol.receipts import BUNDLE_BYTES_MAX

    try:
        with Path(name).open("rb") as file:
            return file.read(BUNDLE_BYTES_MAX + 1)
    except (FileNotFoundError, ValueError):
        data = None
    except OSError as error:
        raise LumarisError("not_found", f"{clean(name)}: {error.strerror}.") from None
    if re.match(ID_PATTERN, name):
        data = read_store(state_folder(settings), lambda store: store.receipt(name))
    if data is None:
        raise LumarisError(
            "not_found",
            f"There is no receipt {clean(name[:200])!r} here.",
            hint="Give a file, or an id of a settled session; `lumaris job ls` lists jobs.",
        )
    return data


def _trusted(settings: Settings, given: tuple[str, ...]) -> frozenset[str]:
    from lumaris.cli.local import standing_of, state_folder
    from lumaris_protocol.keys import public_key_of

    if not given:
        standing = standing_of(state_folder(settings))
        return frozenset((standing.info.coordinator,)) if standing else frozenset()
    for peer in given:
        try:
            public_key_of(peer)
        except ValueError:
            raise LumarisError("usage", f"--trust: {clean(peer[:80])!r} is no peer id.") from None
    return frozenset(given)


def _receipt_json(opened: Receipt) -> dict[str, Any]:
    return {
        **shape(opened, (*_PARTIES, *_MONEY)),
        "issued_at": opened.issued_at,
        "guarantees": list(opened.guarantees),
        "not_guaranteed": list(opened.not_guaranteed),
    }


def _report_json(report: Report) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "coordinator": report.coordinator or None,
        "checks": [shape(check, ("name", "holds", "detail")) for check in report.checks],
        "receipt": _receipt_json(report.receipt) if report.receipt else None,
    }


def _print_receipt(opened: Receipt) -> None:
    fields([(name, getattr(opened, name)) for name in _PARTIES])
    fields([(name.removesuffix("_nanos"), credits_of(getattr(opened, name))) for name in _MONEY])
    fields([("issued", date_of(opened.issued_at))])
    for text in opened.guarantees:
        fields([("guarantees", text)])
    for text in opened.not_guaranteed:
        fields([("does not guarantee", text)])


def _print_report(report: Report) -> None:
    marks = {True: "ok", False: "FAILS"}
    table(
        ("CHECK", "RESULT", "DETAIL"),
        [(check.name, marks[check.holds], check.detail) for check in report.checks],
    )
    if report.receipt is not None and report.verdict != "invalid":
        paid = credits_of(report.receipt.paid_nanos)
        click.echo(f"{report.receipt.receipt}: {paid} {report.receipt.currency} paid")
    click.echo(_SENTENCE[report.verdict])
