"""Help: there for every command, and cheap."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from lumaris.cli.options import LazyGroup, load
from lumaris.cli.root import COMMANDS, root
from tests.sdk.cli.command import call

_BUDGET_S = 0.15
_HEAVY = ("libp2p", "trio", "pydantic", "rich", "httpx", "msgspec", "nacl", "sqlite_utils")


def _commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, *path, name)


ALL = dict(_commands(root))


def test_the_commands() -> None:
    names = {
        " ".join(path) for path, command in ALL.items() if not isinstance(command, click.Group)
    }
    assert names == {
        "demo",
        "run",
        "map",
        "offers",
        "job ls",
        "job show",
        "job logs",
        "job exec",
        "job shell",
        "job forward",
        "job stdin",
        "job cancel",
        "wallet show",
        "wallet deposit",
        "wallet payout",
        "receipt show",
        "receipt fetch",
        "receipt verify",
        "dispute open",
        "dispute show",
        "dispute ls",
        "dispute evidence",
        "dispute withdraw",
        "dispute check",
        "verify dispute",
        "daemon up",
        "daemon status",
        "daemon down",
        "netcheck",
        "ping",
        "node up",
        "node status",
        "node down",
        "node pause",
        "node resume",
        "node image ls",
        "node image import",
        "node image rm",
        "node selftest",
        "challenge",
        "coordinator init",
        "coordinator up",
        "coordinator migrate",
        "coordinator keys list",
        "coordinator keys revoke",
        "coordinator keys rotate",
        "coordinator operator create",
        "coordinator operator list",
        "coordinator operator renew",
        "coordinator operator revoke",
        "coordinator user create",
        "coordinator user key",
        "user show",
        "user link",
        "user unlink",
        "coordinator backup",
        "coordinator restore",
        "coordinator check",
        "coordinator freeze",
        "devnet up",
        "devnet status",
        "devnet down",
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(path: tuple[str, ...], flag: str) -> None:
    found = call(*path, flag)
    assert found.exit_code == 0
    assert found.stdout.startswith(f"Usage: lumaris {' '.join(path)} ")
    assert not found.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_root_repeats_each_commands_own_first_line(name: str) -> None:
    entry, text = COMMANDS[name]
    command: click.Command = load(entry)
    assert command.get_short_help_str(200) == text


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_reads_take_json_and_debug(path: tuple[str, ...]) -> None:
    command = ALL[path]
    if isinstance(command, click.Group):
        return
    names = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--debug"} <= names


def test_version() -> None:
    assert call("--version").stdout == "lumaris 0.1.0\n"


def test_listing_imports_no_command() -> None:
    group = LazyGroup("x", entries={"gone": ("lumaris.cli.gone:gone", "Not there.")})
    context = click.Context(group)
    assert "Not there." in group.get_help(context)
    assert group.get_command(context, "other") is None


@pytest.mark.planet
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["job", "--help"], ["daemon", "--help"], ["ping", "--help"], ["--version"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from lumaris.cli import main\n"
        "sys.argv = ['lumaris', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "finally:\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"    print(sorted(loaded & set({_HEAVY!r})), file=sys.stderr)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert found.stderr.strip() == "[]"


@pytest.mark.planet
@pytest.mark.slow
def test_help_costs_little() -> None:
    costs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from lumaris.cli import main; main()", "--help"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(costs) <= _BUDGET_S, costs
