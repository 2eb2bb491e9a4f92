"""From an exception to what a user reads: one message, whether money moved, the next step."""

from __future__ import annotations

import sys

import click

from lumaris.cli.options import Settings
from lumaris.cli.output import clean, credits_of, emit, note, paint
from lumaris_protocol.errors import LumarisError

_LOGGERS = ("lumaris", "lumaris_overlay", "lumaris_protocol", "httpx", "httpcore")


def report(error: BaseException, settings: Settings) -> int:
    """Print a failure of any kind; its exit code."""
    if settings.debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    cause = cause_of(error)
    if isinstance(cause, LumarisError):
        return show(cause, settings)
    if isinstance(cause, KeyboardInterrupt | click.Abort):
        return show(_interrupted(settings), settings, money=False)
    if isinstance(cause, click.exceptions.NoArgsIsHelpError):
        click.echo(cause.format_message(), err=True)
        return cause.exit_code
    if isinstance(cause, click.ClickException):
        return show(_usage(cause), settings, money=False)
    text = f"{type(cause).__name__}: {cause}".strip(": ")
    hint = "" if settings.debug else "Run again with --debug for the trace."
    return show(LumarisError("internal", text, hint=hint), settings, money=False)


def show(error: LumarisError, settings: Settings, *, money: bool = True) -> int:
    """Print an error and return its exit code; `money`: say whether it moved."""
    if settings.json:
        emit({"error": error.to_json()})
        return error.exit_code
    say(error, money=money)
    return error.exit_code


def say(error: LumarisError, *, money: bool = True) -> None:
    """The message on stderr."""
    text = clean(error.message).rstrip()
    text += "" if text.endswith((".", "!", "?", ")")) else "."
    if money and error.code not in ("busy", "interrupted"):  # then it is not known, or said
        text += " Money moved." if error.money_moved else " No money moved."
    note(paint(f"error[{error.code}]", "red") + f" {text}")
    if error.hint:
        note(f"next: {clean(error.hint)}")


def set_up_logs(settings: Settings) -> None:
    """Keep libraries quiet unless asked; what a user must know comes as an error instead.

    Only our loggers get a handler: `node up` and `coordinator up` set up the root logger.
    """
    import logging

    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    if settings.debug:
        logging.basicConfig(
            level=logging.DEBUG, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s"
        )


def cause_of(error: BaseException) -> BaseException:
    """The one failure in a group that says most: an interrupt, then ours, then the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [cause_of(part) for part in error.exceptions]
    for kind in (KeyboardInterrupt, LumarisError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _interrupted(settings: Settings) -> LumarisError:
    """What was spent by this program until somebody stopped it."""
    hint = "`lumaris job ls` shows what was done and paid."
    import sqlite3

    try:
        from lumaris.cli.local import read_store, state_folder

        found = read_store(state_folder(settings), lambda store: store.spent_by_us())
    except (LumarisError, OSError, sqlite3.Error, KeyboardInterrupt):
        found = None
    if found is None:
        return LumarisError("interrupted", hint=hint)
    spent, held = found
    moved = f"Money moved: {credits_of(spent)}." if spent else "No money moved."
    rest = " What else is held returns when its session is settled." if held else ""
    return LumarisError(
        "interrupted", f"Interrupted. {moved}{rest}", hint=hint, money_moved=spent > 0
    )


def _usage(error: click.ClickException) -> LumarisError:
    context = getattr(error, "ctx", None)
    hint = f"See `{context.command_path} --help`." if context is not None else ""
    text = " ".join(error.format_message().split())  # choices are a line each
    return LumarisError("usage", text, hint=hint)
