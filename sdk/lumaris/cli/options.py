"""What holds for every command: global options, lazily imported groups, and sizes and times."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    _Integer = click.ParamType[int]
else:  # generic only since click 8.4
    _Integer = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT: Final = {"help_option_names": ["-h", "--help"]}
_PACKAGES: Final = ("lumaris_node", "lumaris_coordinator", "lumaris_overlay", "lumaris")
_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass
class Settings:
    """The global options of this call, wherever on the command line they stood."""

    state: Path | None = None
    coordinator: str | None = None
    json: bool = False
    debug: bool = False


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Remember an option that was given; one that was not leaves what an outer level said."""
    settings = context.ensure_object(Settings)
    if value and parameter.name is not None:
        setattr(settings, parameter.name, value)


def _kept(*names: str, **details: Any) -> Callable[[F], F]:
    return click.option(*names, expose_value=False, is_eager=True, callback=_keep, **details)


state_option = _kept(
    "--state",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the key and the records.  [env: LUMARIS_STATE]",
)
coordinator_option = _kept(
    "--coordinator",
    metavar="URL",
    help="The coordinator's address.  [env: LUMARIS_COORDINATOR_URL]",
)
json_option = _kept("--json", is_flag=True, help="Print JSON, errors too.")
debug_option = _kept("--debug", is_flag=True, help="Log to stderr; show the trace of a failure.")


def local_options(command: F) -> F:
    """Options of commands that need no coordinator."""
    return state_option(json_option(debug_option(command)))


def buyer_options(command: F) -> F:
    """Options of commands that act as a buyer."""
    return state_option(coordinator_option(json_option(debug_option(command))))


def plain_options(command: F) -> F:
    """Options of commands with a state folder of their own kind."""
    return json_option(debug_option(command))


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed.

    `entries` maps a command's name to its `module:attribute` and the line that help shows.
    """

    def __init__(self, *args: Any, entries: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table, which is the order people meet them."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.entries:
            return None
        command: click.Command = load(self.entries[cmd_name][0])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.entries.items()])


def load(entry: str, *, extra: str = "all") -> Any:
    """What a `module:attribute` names; the parts of Lumaris meet only here.

    Raises LumarisError `missing_extra` when a package that it needs is not installed.
    """
    module, _, attribute = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.partition(".")[0] in _PACKAGES and "." in name:
            raise  # a module of an installed part: a bug of ours, not a missing package
        raise LumarisError(
            "missing_extra",
            f"This needs the package {name}, which is not installed.",
            hint=f"Install it: pip install 'lumaris[{extra}]'.",
        ) from error


class Size(_Integer):
    """Bytes, from text such as `512MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        found = re.fullmatch(r"(\d{1,6})(?:\.(\d{1,6}))? *([KMGT]?i?B)?", str(value), re.IGNORECASE)
        unit = _UNITS.get((found[3] or "").upper()) if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is not a size; write 512MiB or 2GiB.", param, ctx)
        if not found[3]:
            self.fail(f"{value!r} has no unit; write {value}MiB or {value}GiB.", param, ctx)
        digits = found[2] or ""
        return int(found[1] + digits) * unit // int(10 ** len(digits))


class Seconds(_Integer):
    """Whole seconds, from text such as `90s`, `10m` or `1h30m`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of seconds."""
        text = str(value)
        if re.fullmatch(r"\d{1,9}", text):
            return int(text)
        parts = re.findall(r"(\d{1,9})([smhd])", text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            self.fail(f"{value!r} is not a time; write 90s, 10m or 1h30m.", param, ctx)
        return sum(int(number) * _SECONDS[unit] for number, unit in parts)


SIZE: Final = Size()
SECONDS: Final = Seconds()
