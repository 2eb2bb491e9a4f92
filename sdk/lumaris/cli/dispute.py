"""`lumaris dispute`: claims about a session's money, for its buyer and for its seller."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lumaris.cli.dispute_output import (
    OPEN,
    detail_json,
    next_step,
    print_detail,
    print_lost,
    print_state,
    summary_json,
)
from lumaris.cli.options import CONTEXT, Settings, buyer_options
from lumaris.cli.output import (
    Background,
    Progress,
    clean,
    credits_of,
    date_of,
    emit,
    note,
    peer_of,
    table,
)
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_PATTERN

if TYPE_CHECKING:
    from lumaris.checking import Checked
    from lumaris.client import Client
    from lumaris.disputes import DisputeDesk, Draft
    from lumaris.jobs import JobUpdate, LogLine, Plan
    from lumaris_protocol.coordinator_api import Dispute, DisputeDetail

T = TypeVar("T")

CLAIMS: Final = (
    "not_delivered",
    "wrong_result",
    "unpaid_delivery",
    "stale_voucher",
    "forged_voucher",
    "equivocation",
)

_REPLAY: Final = {
    True: "anyone can replay it with",
    False: "there is no ruling yet; what there is can be checked with",
}


@click.group("dispute", context_settings=CONTEXT)
def dispute() -> None:
    """Dispute what was sold or paid, and answer.

    A node's folder works as well as a buyer's: name it with --state. A node answers disputes
    against it by itself. docs/disputes.md has the claims, the rules and the bonds.
    """


@dispute.command("open")
@click.argument("name", metavar="SESSION_OR_JOB")
@click.option("--claim", type=click.Choice(CLAIMS), required=True, help="What is claimed.")
@click.option(
    "--order",
    type=click.IntRange(min=1),
    default=None,
    help="The order with the wrong result.  [default: the job's]",
)
@click.option(
    "--amount", metavar="CREDITS", help="What to ask for.  [default: what the evidence shows]"
)
@click.option(
    "--document",
    "documents",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A signed document to show beside what was kept; repeatable.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@buyer_options
@click.pass_obj
def open_(
    settings: Settings,
    name: str,
    claim: Any,
    order: int | None,
    amount: str | None,
    documents: tuple[Path, ...],
    yes: bool,
) -> None:
    """Make a claim, with the evidence kept of it.

    It is about one session. It takes a bond from the account, which comes back unless the claim is
    refuted, withdrawn, or left without the check that it needs. Nothing is signed before you agree;
    without a terminal give --yes.
    """
    from lumaris.client import parse_amount

    if order is not None and claim != "wrong_result":
        raise LumarisError("usage", "--order goes with --claim wrong_result.")
    nanos = parse_amount(amount, "--amount") if amount is not None else None
    shown = _read_documents(documents)
    _check_id(name, "session or job", "ses_", "job_")

    async def work(desk: DisputeDesk) -> Dispute:
        draft = await desk.draft(name, claim, order=order or 0, amount_nanos=nanos, documents=shown)
        await _agree(settings, draft, yes=yes)
        return await desk.open(draft)

    found = _with_desk(settings, work)
    if settings.json:
        emit(summary_json(found))
        return
    print_state(found)
    if found.state not in OPEN:
        note(clean(f"next: see the ruling with `lumaris dispute show {found.dispute}`"))
        return
    if found.opener == found.buyer and found.stake_nanos < found.amount_nanos:
        note(
            f"the seller's bond has {credits_of(found.stake_nanos)} for this now; more can be"
            " refunded only if it puts more down"
        )
    note(clean(f"next: {next_step(found, found.opener)}"))


@dispute.command("show")
@click.argument("dispute_id", metavar="[DISPUTE]", default="")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the dispute file there, for anyone to verify.",
)
@buyer_options
@click.pass_obj
def show(settings: Settings, dispute_id: str, save: Path | None) -> None:
    """Show one dispute, or list all.

    State, deadlines, who must act, what was shown, who checks, the ruling and the money.
    """
    if not dispute_id:
        if save is not None:
            raise LumarisError("usage", "--save needs the id of a dispute.")
        _list(settings)
        return
    _check_id(dispute_id, "dispute", "dsp_")

    async def work(desk: DisputeDesk) -> tuple[DisputeDetail, str, bytes]:
        found = await desk.show(dispute_id)
        file = await desk.file(dispute_id) if save is not None else b""
        return found, desk.key.peer_id, file

    found, us, file = _with_desk(settings, work)
    if save is not None:
        _write(save, file)
    if settings.json:
        emit(detail_json(found, us))
        return
    print_detail(found, us)
    if save is not None:
        note(
            f"saved to {save}; {_REPLAY[found.ruling is not None]} `lumaris verify dispute {save}`"
        )


@dispute.command("ls")
@buyer_options
@click.pass_obj
def list_disputes(settings: Settings) -> None:
    """List disputes, oldest first: their state, and who must act."""
    _list(settings)


@dispute.command("evidence")
@click.argument("dispute_id", metavar="DISPUTE")
@click.option("--done", is_flag=True, help="Say that you have no more: the ruling need not wait.")
@click.option(
    "--document",
    "documents",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="Show these signed documents instead of what was kept; repeatable.",
)
@buyer_options
@click.pass_obj
def evidence(settings: Settings, dispute_id: str, done: bool, documents: tuple[Path, ...]) -> None:
    """Show signed documents of the session.

    Those that were kept here and were not shown yet; nothing is spent.
    """
    _check_id(dispute_id, "dispute", "dsp_")
    given = _read_documents(documents) or None

    async def work(desk: DisputeDesk) -> tuple[Dispute, int]:
        return await desk.add_evidence(dispute_id, documents=given, done=done)

    found, count = _with_desk(settings, work)
    if settings.json:
        emit({**summary_json(found), "shown": count})
        return
    print_state(found)
    note(f"{count} documents shown")


@dispute.command("withdraw")
@click.argument("dispute_id", metavar="DISPUTE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@buyer_options
@click.pass_obj
def withdraw(settings: Settings, dispute_id: str, yes: bool) -> None:
    """Take a claim back.

    After the other side has answered, the claim's bond is lost; before, the least bond at most.
    """
    from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN

    _check_id(dispute_id, "dispute", "dsp_")

    async def work(desk: DisputeDesk) -> Dispute:
        found = await desk.show(dispute_id)
        answered = any(shown.n > 0 and shown.by != found.opener for shown in found.evidence)
        if found.state not in OPEN:
            raise LumarisError("dispute_closed", f"The dispute is over: {clean(found.state)}.")
        if not settings.json:
            least = credits_of(min(found.bond_nanos, DISPUTE_BOND_NANOS_MIN))
            lost = "all of it, for the other side has answered" if answered else least
            note(
                f"bond     {credits_of(found.bond_nanos)} {clean(found.currency)}; lost is {lost},"
                " half of that to the other side"
            )
        await _confirm(settings, yes=yes)
        gone = await desk.withdraw(dispute_id)
        try:
            return await desk.show(dispute_id)
        except LumarisError:  # it is withdrawn all the same
            return gone

    found = _with_desk(settings, work)
    if settings.json:
        emit(summary_json(found))
        return
    print_state(found)
    print_lost(found)


@dispute.command("check")
@click.argument("dispute_id", metavar="DISPUTE")
@click.option(
    "--input",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A file or folder that was an input of the order, found by its content; repeatable.",
)
@click.option("--image", default="", metavar="IMAGE", help="The order's image, if it was a file.")
@click.option("--max-cost", default="0.01", show_default=True, help="Hard cap in credits.")
@click.option("--yes", is_flag=True, help="Do not ask before money is held.")
@buyer_options
@click.pass_obj
def check(
    settings: Settings,
    dispute_id: str,
    sources: tuple[Path, ...],
    image: str,
    max_cost: str,
    yes: bool,
) -> None:
    """Have the drawn checker run the order again.

    Only the drawn seller is asked, and what it signs is filed. The run is paid like any other,
    whatever it comes to. A run that was made and not filed is filed without buying another.
    """
    from lumaris.cli.work import open_client
    from lumaris.client import parse_amount

    _check_id(dispute_id, "dispute", "dsp_")
    parse_amount(max_cost, "--max-cost")
    files = [file for source in sources for file in _files(source)]
    run = _CheckRun(settings, yes=yes)
    with run.progress, run.background, open_client(settings) as client:
        run.progress.say("looking for the drawn checker")
        checked = client.check_dispute(
            dispute_id,
            sources=files,
            image=image,
            max_cost=max_cost,
            observe=run.observe,
            approve=run.approve,
        )
        run.background.do(lambda: run.progress.say("filed"))
        detail, us = _filed(client, checked), client.peer
    if settings.json:
        emit(
            {
                **detail_json(detail, us),
                "session": checked.session,
                "ran_before": checked.ran_before,
            }
        )
        return
    print_detail(detail, us)


def _filed(client: Client, checked: Checked) -> DisputeDetail:
    """The dispute after a check. Raises LumarisError that says what is done all the same."""
    try:
        return client.dispute(checked.dispute.dispute)
    except LumarisError as error:
        raise LumarisError(
            error.code,
            f"The checker's answer is filed. {error.message}",
            hint="`lumaris dispute show` tells how it ended.",
            money_moved=not checked.ran_before,
        ) from None


class _CheckRun:
    """What is shown while a checker works."""

    def __init__(self, settings: Settings, *, yes: bool) -> None:
        self._settings, self._yes = settings, yes
        self.progress = Progress(quiet=settings.json)
        self.background = Background()

    def observe(self, event: JobUpdate | LogLine) -> None:
        """From the thread that keeps the session alive: hand it on and return."""
        from lumaris.jobs import LogLine

        if not isinstance(event, LogLine):
            text = f"{event.job} {event.state} at {peer_of(event.seller)}"
            self.background.do(lambda: self.progress.say(text))

    def approve(self, plan: Plan) -> bool:
        """Show the signed quote, and ask where somebody can answer."""
        from lumaris.cli.work import asks, confirm

        self.progress.pause()
        if not self._settings.json:
            note(f"checker  {peer_of(plan.seller)} in {plan.region}, and nobody else")
            note(
                f"price    {credits_of(plan.start_nanos)} to start,"
                f" {credits_of(plan.rate_nanos_per_s * 3600)} {plan.currency} an hour"
            )
            note(
                f"cap      {credits_of(plan.cap_nanos)} {plan.currency} is held;"
                " what is unused returns"
            )
        return confirm() if asks(self._settings, yes=self._yes) else True


async def _agree(settings: Settings, draft: Draft, *, yes: bool) -> None:
    """Show what will be signed and what it costs, and ask. Raises LumarisError `declined`."""
    agreement = draft.contract.agreement
    currency = agreement.terms.currency
    if not settings.json:
        about = f"order {draft.order} of {agreement.session}" if draft.order else agreement.session
        note(f"claim    {draft.claim} about {about}, against {peer_of(draft.respondent)}")
        note(f"asked    {credits_of(draft.amount_nanos)} {currency}")
        for line in _prospects(draft):
            note(line)
        note(
            f"bond     {credits_of(draft.bond_nanos)} {currency} is taken from your account now; it"
            " returns unless the claim is refuted, withdrawn, or left without a check"
        )
        note(f"evidence {len(draft.evidence)} signed documents are shown to the other side")
        note(f"then     {_AFTER[draft.claim]}")
    await _confirm(settings, yes=yes)


def _prospects(draft: Draft) -> list[str]:
    """What can be won by it, as things stand now."""
    lines = []
    if draft.opener == draft.contract.agreement.buyer:
        there = credits_of(draft.their_bond_nanos)
        less = draft.their_bond_nanos < draft.amount_nanos
        most = "; no more can be won unless it puts more down" if less else ""
        lines.append(f"against  the seller's bond has {there} for this now{most}")
    if draft.claim == "wrong_result":
        least = 2 if draft.contract.agreement.verification == "repl" else 1
        few = "too few" if draft.checkers else "nobody"
        none = f"{few} could be drawn to check now; without a check everything goes back"
        many = f"{draft.checkers} with a bond could be drawn now"
        lines.append(f"checkers {many if draft.checkers >= least else none}")
    return lines


async def _confirm(settings: Settings, *, yes: bool) -> None:
    """Have somebody agree. Raises LumarisError `declined`; then nothing was signed."""
    import trio

    from lumaris.cli.work import asks, confirm

    if yes:
        return
    if not asks(settings, yes=yes):
        raise LumarisError("declined", "Nothing was signed.", hint="Without a terminal say --yes.")
    if not await trio.to_thread.run_sync(confirm, abandon_on_cancel=True):
        raise LumarisError("declined", "Nothing was signed.")


_AFTER: Final = {
    "equivocation": "it is ruled on at once by what is shown",
    "forged_voucher": "it is ruled on at once by what is shown",
    "stale_voucher": "it is ruled on at once by what is shown",
    "not_delivered": "both sides show evidence; it is ruled on when both are done, or in time",
    "unpaid_delivery": "the rest of the escrow is frozen; both sides show evidence; then it is"
    " ruled on",
    "wrong_result": "a checker is drawn; you have it run the order again at your cost with"
    " `lumaris dispute check`",
}


def _list(settings: Settings) -> None:
    async def work(desk: DisputeDesk) -> tuple[list[Dispute], str]:
        return await desk.disputes(), desk.key.peer_id

    found, us = _with_desk(settings, work)
    if settings.json:
        emit({"items": [{**summary_json(one), "next": next_step(one, us)} for one in found]})
        return
    table(
        ("DISPUTE", "STATE", "CLAIM", "OPENER", "ASKED", "OPENED", "NEXT"),
        [
            (
                one.dispute,
                one.state,
                one.claim,
                "you" if one.opener == us else peer_of(one.opener),
                credits_of(one.amount_nanos),
                date_of(one.opened_at),
                next_step(one, us),
            )
            for one in found
        ],
    )


def _with_desk(settings: Settings, work: Callable[[DisputeDesk], Awaitable[T]]) -> T:
    import trio

    from lumaris import disputes
    from lumaris.cli.account import profile_of
    from lumaris.cli.errors import cause_of

    async def main() -> T:
        async with disputes.open_desk(profile_of(settings)) as desk:
            return await work(desk)

    try:
        return trio.run(main)
    except BaseException as error:
        if not isinstance(cause_of(error), KeyboardInterrupt):
            raise
        raise LumarisError(
            "interrupted", hint="`lumaris dispute show` says what was done."
        ) from None


def _check_id(name: str, what: str, *prefixes: str) -> None:
    if not re.match(ID_PATTERN, name) or not name.startswith(prefixes):
        raise LumarisError(
            "not_found",
            f"{clean(name[:80])!r} is no {what}.",
            hint="`lumaris dispute ls` lists disputes, `lumaris job ls` jobs.",
        )


def _files(source: Path) -> list[Path]:
    """The plain files of an argument. Raises LumarisError `bad_input` for none or too many."""
    from lumaris_protocol.limits import INPUT_FILES_MAX

    if source.is_file():
        return [source]
    if not source.is_dir():
        raise LumarisError("bad_input", f"There is no file {source}.")
    found = []
    for path in source.rglob("*"):
        if path.is_file():
            found.append(path)
        if len(found) > INPUT_FILES_MAX:
            raise LumarisError("bad_input", f"{source} holds more files than an order may have.")
    return found


def _read_documents(paths: tuple[Path, ...]) -> tuple[bytes, ...]:
    from lumaris.cli.receipt import read_named
    from lumaris_protocol.limits import SESSION_DOCUMENT_BYTES_MAX

    return tuple(read_named(path, SESSION_DOCUMENT_BYTES_MAX) for path in paths)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise LumarisError(
            "not_writable", f"{path}: {error.strerror}", hint="Choose another with --save."
        ) from None
