"""`lumaris verify`: what a coordinator decided, replayed from its file without asking anyone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lumaris.cli.options import CONTEXT, Settings, local_options
from lumaris.cli.output import clean, credits_of, emit, shape, table
from lumaris.cli.receipt import read_named, trusted_peers
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_protocol.dispute_file import Report
    from lumaris_protocol.log_policy import LogPolicy
    from lumaris_protocol.messages.notice import KeyList

_EXIT: Final = {"valid": 0, "invalid": 1, "unknown": 2}
_SENTENCE: Final = {
    "valid": "valid: this ruling follows from this evidence",
    "invalid": "invalid: do not rely on this file",
    "unknown": "cannot tell: it holds together, but there is no ruling under keys and witnesses"
    " trusted here",
}
_RULING: Final = (
    "dispute",
    "claim",
    "fault",
    "rule",
    "award_nanos",
    "refund_nanos",
    "slash_nanos",
    "collected_nanos",
    "victim_nanos",
    "bond_returned",
)


@click.group("verify", context_settings=CONTEXT)
def verify() -> None:
    """Replay a ruling from its file, without asking anyone."""


@verify.command("dispute")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trust",
    "--coordinator",
    "trust",
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
    help="The coordinator's key list: a ruling counts under a key of its time. Needs --root.",
)
@click.option("--root", metavar="PEER", help="The peer id of the root that signs the key list.")
@local_options
@click.pass_obj
def dispute(
    settings: Settings,
    file: Path,
    trust: tuple[str, ...],
    policy: Path | None,
    key_list: Path | None,
    root: str | None,
) -> int:
    """Replay a dispute file: every signature, the draws, and the rules.

    Exits with 0 when the ruling follows, 1 when anything fails, and 2 when this machine cannot
    tell: there is no ruling yet, its coordinator is not trusted here, too few of the policy's
    witnesses cosigned the log, or there is no such file.
    """
    from lumaris.cli import errors
    from lumaris_protocol.limits import DISPUTE_FILE_BYTES_MAX

    try:
        anchors = _read_policy(policy)
        data = read_named(file, DISPUTE_FILE_BYTES_MAX)
        listed = _read_list(key_list, root, data)
        trusted = _trusted(settings, trust, anchors) if key_list is None else frozenset()
    except LumarisError as error:
        errors.show(error, settings)
        return _EXIT["unknown"]
    report = _replay(data, trusted, anchors, listed)
    if settings.json:
        emit(_report_json(report))
    else:
        _print(report)
    return _EXIT[report.verdict]


def _read_policy(path: Path | None) -> LogPolicy | None:
    from lumaris_protocol import log_policy

    if path is None:
        return None
    return log_policy.parse(read_named(path, log_policy.POLICY_BYTES_MAX))


def _read_list(path: Path | None, root: str | None, file: bytes) -> KeyList | None:
    """The key list, checked for a dispute file's network; None without one, or for no such file.

    Raises LumarisError for a list that is not the root's: that is no fault of the ruling.
    """
    from lumaris_protocol import dispute_file, key_list
    from lumaris_protocol.limits import NOTICE_BYTES_MAX

    if (path is None) != (root is None):
        raise LumarisError("usage", "--key-list and --root go together.")
    if path is None:
        return None
    data = read_named(path, NOTICE_BYTES_MAX)
    try:
        network = dispute_file.decode(file).network
    except LumarisError:
        return None
    return key_list.open_list(data, network=network, root=root).message


def _trusted(
    settings: Settings, given: tuple[str, ...], policy: LogPolicy | None
) -> frozenset[str]:
    from lumaris_protocol.keys import peer_id_of

    logs = policy.logs if policy is not None else []
    named = frozenset(str(peer_id_of(key.public_key)) for key in logs)
    if named and not given:
        return named
    return trusted_peers(settings, given) | named


def _replay(
    data: bytes, trusted: frozenset[str], policy: LogPolicy | None, listed: KeyList | None
) -> Report:
    """The report of the replay, and of a policy's witnesses on the ruling's place in the log."""
    from lumaris_protocol import dispute_file, log_policy
    from lumaris_protocol.receipts import Check

    report = dispute_file.verify(data, trusted=trusted, listed=listed)
    if policy is None or report.ruling is None or report.verdict == "invalid":
        return report
    entry = dispute_file.decode(data).ruling
    assert entry is not None, "the replay opened it"
    try:
        standing = log_policy.check(policy, entry.checkpoint)
    except LumarisError as error:
        report.checks.append(Check("witnesses", holds=False, detail=error.message))
        report.verdict = "invalid"
        return report
    names = ", ".join(standing.witnesses).encode(errors="replace").decode() or "none"
    known = standing.enough and (standing.log is not None or not policy.logs)
    report.checks.append(Check("witnesses", known, f"of the policy's: {names}"))
    report.verdict = report.verdict if known else "unknown"
    return report


def _report_json(report: Report) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "coordinator": report.coordinator or None,
        "checks": [shape(check, ("name", "holds", "detail")) for check in report.checks],
        "ruling": shape(report.ruling, _RULING) if report.ruling else None,
    }


def _print(report: Report) -> None:
    marks = {True: "ok", False: "FAILS"}
    table(
        ("CHECK", "RESULT", "DETAIL"),
        [(check.name, marks[check.holds], check.detail) for check in report.checks],
    )
    ruling = report.ruling
    if ruling is not None and report.verdict != "invalid":
        click.echo(
            f"{clean(ruling.dispute)}: {ruling.rule}, {ruling.fault} at fault;"
            f" refund {credits_of(ruling.refund_nanos)}, award {credits_of(ruling.award_nanos)}"
            f" {ruling.currency}"
        )
    click.echo(_SENTENCE[report.verdict])
