"""`lumaris receipt`: receipts as files, and whether they hold. All of it works offline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lumaris.cli.options import CONTEXT, Settings, buyer_options, local_options
from lumaris.cli.output import clean, credits_of, date_of, emit, fields, note, shape, table
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN

if TYPE_CHECKING:
    from lumaris_protocol.log_policy import LogPolicy
    from lumaris_protocol.messages.notice import KeyList
    from lumaris_protocol.messages.receipt import Receipt
    from lumaris_protocol.receipts import Report

_EXIT: Final = {"valid": 0, "invalid": 1, "unknown": 2}
_SENTENCE: Final = {
    "valid": "valid: every check holds",
    "invalid": "invalid: do not rely on this receipt",
    "unknown": "cannot tell: it holds together, but not under keys and witnesses trusted here",
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
@click.option(
    "--proof",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write its place in the log there, as a C2SP tlog-proof for other tools.",
)
@local_options
@click.pass_obj
def show(settings: Settings, name: str, out: Path | None, proof: Path | None) -> None:
    """Show what was held, paid, charged and returned."""
    from lumaris.cli.local import open_receipt
    from lumaris_protocol import receipts

    data = _read(settings, name)
    opened = open_receipt(data)
    if out is not None:
        _write(out, data, "--out")
    if proof is not None:
        _write(proof, receipts.tlog_proof(receipts.decode_bundle(data)).encode(), "--proof")
    if settings.json:
        emit(_receipt_json(opened))
        return
    _print_receipt(opened)
    if out is not None:
        note(f"saved to {out}; anyone can check it with `lumaris receipt verify {out}`")


@receipt.command("fetch")
@click.argument("name", metavar="FILE_OR_ID")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    required=True,
    help="Write the receipt file there.",
)
@buyer_options
@click.pass_obj
def fetch(settings: Settings, name: str, out: Path) -> None:
    """Get a receipt anew, with the cosignatures that its log has by now.

    A receipt comes with the payment, before any witness has seen it; those of the next minute are
    what a policy asks for.
    """
    from lumaris.cli import account
    from lumaris.cli.local import open_receipt
    from lumaris_protocol import notes, receipts

    asked = _receipt_id(settings, name)
    data = account.fetch_receipt(account.profile_of(settings), asked)
    if open_receipt(data).receipt != asked:
        raise LumarisError("receipt_invalid", "The coordinator sent another receipt.")
    _write(out, data, "--out")
    bundle = receipts.decode_bundle(data)
    lines = notes.parse(bundle.checkpoint).lines
    named = {line.name for line in lines if notes.witness_of(bundle.network, line.name)}
    if settings.json:
        emit({"receipt": asked, "log_size": bundle.proof.size, "cosignatures": len(named)})
        return
    fields([("receipt", asked), ("log size", bundle.proof.size), ("cosignatures", len(named))])
    note(f"saved to {out}; check it with `lumaris receipt verify {out}`")


def _receipt_id(settings: Settings, name: str) -> str:
    """The id of a receipt that is here, or an id itself. Raises LumarisError."""
    from lumaris.cli.local import open_receipt
    from lumaris_protocol.ids import PREFIXES

    try:
        return open_receipt(_read(settings, name)).receipt
    except LumarisError as error:
        if error.code != "not_found" or not re.match(ID_PATTERN, name):
            raise
        if not name.startswith(PREFIXES["receipt"]):
            raise
        return name


def _write(path: Path, data: bytes, option: str) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise LumarisError(
            "not_writable", f"{path}: {error.strerror}", hint=f"Choose another with {option}."
        ) from None


@receipt.command("verify")
@click.argument("names", metavar="FILE_OR_ID...", nargs=-1, required=True)
@click.option(
    "--trust",
    multiple=True,
    metavar="PEER",
    help="A coordinator's peer id to trust; repeatable.  [default: the one this buyer uses]",
)
@click.option(
    "--policy",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Whose log to trust and which witnesses must have cosigned it (C2SP tlog-policy).",
)
@click.option(
    "--key-list",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The coordinator's key list: a receipt counts under a key of its time. Needs --root.",
)
@click.option("--root", metavar="PEER", help="The peer id of the root that signs the key list.")
@local_options
@click.pass_obj
def verify(settings: Settings, /, names: tuple[str, ...], **options: Any) -> int:
    """Check receipts without asking anyone.

    Exits with 0 when all are valid, 1 when one is not, and otherwise 2 when this machine cannot
    tell: the coordinator that signed it is not trusted here, too few of the policy's witnesses
    cosigned the log, or there is no such receipt.
    """
    from lumaris.cli import errors

    try:
        anchors = _anchors(settings, **options)
    except LumarisError as error:
        errors.show(error, settings)
        return _EXIT["unknown"]
    results = [_verify(settings, name, anchors) for name in names]
    if settings.json:
        _emit_results(settings, names, results)
    else:
        for name, result in zip(names, results, strict=True):
            _print_result(settings, name if len(names) > 1 else "", result)
    return _EXIT[_worst(results)]


@dataclass(frozen=True)
class _Anchors:
    """Whom to believe."""

    trusted: frozenset[str]
    policy: LogPolicy | None
    key_list: bytes | None
    root: str | None


def _verify(settings: Settings, name: str, anchors: _Anchors) -> Report | LumarisError:
    from lumaris_protocol import receipts

    try:
        data = _read(settings, name)
        listed = None
        if anchors.key_list is not None:
            listed = _open_list(anchors.key_list, anchors.root, data)
    except LumarisError as error:
        return error
    return receipts.verify_bundle(
        data, trusted=anchors.trusted, policy=anchors.policy, key_list=listed
    )


def _open_list(data: bytes, root: str | None, file: bytes) -> KeyList | None:
    """The key list, checked for the network of a receipt file; None for a file that is none.

    Raises LumarisError for a list that is not the root's: that is no fault of the receipt.
    """
    from lumaris_protocol import key_list, receipts

    try:
        network = receipts.decode_bundle(file).network
    except LumarisError:
        return None
    return key_list.open_list(data, network=network, root=root).message


def _worst(results: list[Report | LumarisError]) -> str:
    found = {"unknown" if isinstance(one, LumarisError) else one.verdict for one in results}
    return next(verdict for verdict in ("invalid", "unknown", "valid") if verdict in found)


def _print_result(settings: Settings, name: str, result: Report | LumarisError) -> None:
    from lumaris.cli import errors

    if name:
        click.echo(f"{clean(name)}:")
    if isinstance(result, LumarisError):
        errors.show(result, settings)
    else:
        _print_report(result)


def _emit_results(
    settings: Settings, names: tuple[str, ...], results: list[Report | LumarisError]
) -> None:
    """One report, or for several receipts {verdict, receipts}."""
    from lumaris.cli import errors

    if len(results) > 1:
        shown = [
            {"file": name}
            | ({"error": one.to_json()} if isinstance(one, LumarisError) else _report_json(one))
            for name, one in zip(names, results, strict=True)
        ]
        emit({"verdict": _worst(results), "receipts": shown})
    elif isinstance(results[0], LumarisError):
        errors.show(results[0], settings)
    else:
        emit(_report_json(results[0]))


def _anchors(
    settings: Settings,
    *,
    trust: tuple[str, ...],
    policy: Path | None,
    key_list: Path | None,
    root: str | None,
) -> _Anchors:
    """Read what the options name. Raises LumarisError."""
    from lumaris_protocol import log_policy
    from lumaris_protocol.limits import NOTICE_BYTES_MAX

    if (key_list is None) != (root is None):
        raise LumarisError("usage", "--key-list and --root go together.")
    found = None
    if policy is not None:
        found = log_policy.parse(read_named(policy, log_policy.POLICY_BYTES_MAX))
    known = not trust and (key_list is not None or (found is not None and bool(found.logs)))
    return _Anchors(
        trusted=frozenset() if known else trusted_peers(settings, trust),
        policy=found,
        key_list=read_named(key_list, NOTICE_BYTES_MAX) if key_list is not None else None,
        root=root,
    )


def read_named(path: Path, bytes_max: int) -> bytes:
    """A file that an option names, and a byte more than it may have. Raises LumarisError."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise LumarisError(
            "not_found", f"{clean(str(path))}: {error.strerror}.", hint="Check the path."
        ) from None


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
        raise LumarisError(
            "not_found", f"{clean(name)}: {error.strerror}.", hint="Check the path."
        ) from None
    if re.match(ID_PATTERN, name):
        data = read_store(state_folder(settings), lambda store: store.receipt(name))
    if data is None:
        raise LumarisError(
            "not_found",
            f"There is no receipt {clean(name[:200])!r} here.",
            hint="Give a file, or an id of a settled session; `lumaris job ls` lists jobs.",
        )
    return data


def trusted_peers(settings: Settings, given: tuple[str, ...]) -> frozenset[str]:
    """The peers named to be trusted, else the coordinator of this folder. Raises `usage`."""
    from lumaris.cli.local import standing_of, state_folder
    from lumaris_protocol.keys import public_key_of

    if not given:
        standing = standing_of(state_folder(settings))
        return standing.trusted().ever if standing else frozenset()
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
