"""Writes the parts of docs/ that follow from the code; `--check` only says if they are current.

A generated part stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->` in a page; the
rest of the page is written by people. `make docs` runs this program.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from msgspec import inspect

from lumaris.cli.root import root
from lumaris_coordinator.app import ROUTERS
from lumaris_coordinator.config import Settings
from lumaris_coordinator.upkeep.config_file import MEANINGS
from lumaris_node.config import NodeConfig
from lumaris_protocol import codes, limits, protocols
from lumaris_protocol.frames import Kind
from lumaris_protocol.machines import buyer, desk, dispute, escrow, job, seller
from lumaris_protocol.messages import base, receipt
from lumaris_protocol.registry import MESSAGES

FOLDER: Final = Path(__file__).parent
ROOT: Final = FOLDER.parent
SOURCES: Final = ("protocol", "node", "coordinator", "sdk", "tests", ".ci")
_BLOCK: Final = re.compile(
    r"(?P<open><!-- generated:(?P<name>[a-z-]+) -->\n).*?(?P<close><!-- end:(?P=name) -->)",
    re.DOTALL,
)
_HELP_WIDTH: Final = 96

# What a setting is for. A setting without a line here, or a line without a setting, is an error.
NODE_MEANINGS: Final = {
    "settle.dispute_unpaid": "Dispute a session that ended with delivered and unpaid work,"
    " before it is claimed; that takes a bond from the node's account.",
    "coordinator": "The coordinator's address. Flag: `--coordinator`.",
    "coordinator_ca": "PEM file of the authority of a coordinator that has its own. Default: what"
    " this machine trusts.",
    "listen": "IP and TCP port for peers; port 0 lets the system choose. Flag: `--listen`.",
    "direct": "IP and TCP port where other programs connect directly; empty means the IP of"
    " `listen` and any port, `off` that all goes through the overlay.",
    "region": "A free name that buyers can filter by. Flag: `--region`.",
    "bootstrap": "Addresses of peers to join by, besides those the coordinator names.",
    "overlay_memory_mib": "Memory the overlay process may hold before it is restarted, in MiB.",
    "modules": "A folder for compiled WebAssembly and the reports of self-tests, which"
    " several nodes of one owner may share; empty means the state folder.",
    "share.cpu_percent": "Part of the hardware threads that is for sale.",
    "share.memory_percent": "Part of the memory that is for sale.",
    "share.disk_percent": "Part of the free disk that is for sale.",
    "share.transfer_mib_s": "MiB a second that the files of all jobs together may take, both"
    " ways; 0 is no limit.",
    "share.cpu_threads": "Hardware threads for sale; 0 means by `cpu_percent`.",
    "share.pids_max": "Processes and threads that one job may have at most, whatever it asks for.",
    "share.encryption": "How the files of jobs are kept unreadable on disk: `auto` takes the first"
    " of the others that works here; `off` keeps them as they are.",
    "price.currency": "Must be the coordinator's.",
    "price.start": "Credits for each order that starts.",
    "price.cpu_core_hour": "Credits for one hardware thread for an hour.",
    "price.memory_gib_hour": "Credits for one GiB of memory for an hour.",
    "price.disk_gib_hour": "Credits for one GiB of disk for an hour.",
    "price.gpu_hour": "Credits for one GPU for an hour.",
    "accept.runtimes": "Tiers to offer, of those that work on this machine.",
    "network.announce": "Addresses to tell other peers besides those found, as `/ip4/IP/tcp/PORT`;"
    " a forwarded port, for example.",
    "network.relay_service": "Carry control traffic of peers that nobody can dial, within limits."
    " For nodes with a public address.",
    "network.mdns": "Find peers on the local network by multicast DNS, and be found by them.",
    "accept.lease_s_max": "The longest session, in seconds.",
    "accept.egress": "What jobs may connect to when an agreement says so, as `HOST:PORT`,"
    " `*.DOMAIN:PORT` or `*:PORT`; this machine's own networks never. Empty means nothing.",
    "accept.buyer_images": "Take container images that buyers send or name.",
    "accept.registries": "Registries that images are pulled from; none when empty.",
    "accept.gpu": "Sell the GPUs that were found.",
    "vm.kernel": "The kernel that the tier `vm` boots, as `/boot/vmlinuz-RELEASE`, with its modules"
    " in `/lib/modules/RELEASE`; add `vm` to `accept.runtimes`.",
    "schedule.days": "Days on which new work is taken.",
    "schedule.hours": "Local times at which new work is taken, as `HH:MM-HH:MM`; one past midnight"
    " belongs to the day it begins on. Empty means all day. Running leases go on to their end.",
    "log_level": "`debug` with the flag `--debug`.",
}
STATE_MEANING: Final = "Folder of the keys, the settings and, without `database`, the data."
COORDINATOR_FLAGS: Final = {
    "state": "--state",
    "host": "--host",
    "port": "--port",
    "network": "--network",
    "fee_bps": "--fee-bps",
    "settle_window_s": "--settle-window",
    "test_credit_nanos": "--test-credit",
    "shard_map": "--shard-map",
    "overlay": "--overlay/--no-overlay",
    "overlay_listen": "--overlay-listen",
}
ENVIRONMENT_MEANINGS: Final = {
    "LUMARIS_STATE": "The buyer's folder, as `--state`. Default: `buyer` in the user's data"
    " folder.",
    "LUMARIS_COORDINATOR_URL": "The coordinator, as `--coordinator`. Default:"
    " `http://127.0.0.1:24480`.",
    "LUMARIS_CA_FILE": "PEM file of the authority of a coordinator that has its own, for buyers and"
    " `lumaris node up`. Default: what this machine trusts.",
    "LUMARIS_API_KEY": "A user's API key, for `lumaris user`.",
    "LUMARIS_OVERLAY_LINGER_S": "Seconds the buyer's overlay process stays after its last client."
    " Default: 180.",
    "LUMARIS_OVERLAY_LISTEN": "IP:PORT where the buyer's overlay process listens. Default: a free"
    " port, on loopback when the coordinator is there, else on every address.",
    "LUMARIS_TRANSFER_MIB_S": "MiB a second that a buyer's files may take, both ways. Default: 0,"
    " no limit.",
    "LUMARIS_COORDINATOR_DATABASE": "The coordinator's `database`, such as `postgresql://…`; it"
    " wins over the file, and keeps a password out of it.",
    "LUMARIS_EXAMPLES": "Tests only: how many runs the property tests of the ledger make.",
    "LUMARIS_REQUIRE_APT": "Tests only: `1` makes missing Debian packages a failure.",
    "LUMARIS_REQUIRE_DOCKER": "Tests only: `1` makes a missing Docker engine a failure.",
    "LUMARIS_REQUIRE_NAMESPACES": "Tests only: `1` makes a lack of network namespaces a failure.",
    "LUMARIS_REQUIRE_POSTGRES": "Tests only: `1` makes missing PostgreSQL programs a failure.",
    "LUMARIS_REQUIRE_PROCESS": "Tests only: `1` makes a missing process tier a failure.",
    "LUMARIS_REQUIRE_REGISTRY": "Tests only: `1` makes a missing `docker-registry` a failure.",
    "LUMARIS_REQUIRE_SCIENCE": "Tests only: `1` makes a missing `python-science` extra a failure.",
    "LUMARIS_REQUIRE_VM": "Tests only: `1` makes a missing QEMU, kernel or busybox a failure.",
    "LUMARIS_REQUIRE_VOLUMES": "Tests only: `1` makes a kind of volume that fails a failure.",
    "LUMARIS_STORM": "Tests only: the operations of the storm of settlements, such as 100000.",
    "LUMARIS_TEST_STORE": "Tests only: `postgres` runs the coordinator's tests on PostgreSQL.",
    "LUMARIS_TEST_MARK": "Tests only: marks the processes of guests, so that they are found again.",
}
_TYPES: Final = {
    base.Id: "id",
    base.Digest: "digest",
    base.Peer: "peer",
    base.Name: "name",
    base.Currency: "currency",
    base.Nonce: "nonce",
    base.Time: "time",
    base.Amount: "count",
}


# --- the parts ---


def machine(table: Any) -> str:
    """A machine's transitions."""
    ends = ", ".join(f"`{state}`" for state in table.states if state in table.final)
    return f"Starts in `{table.initial}`, ends in {ends}.\n\n{table.markdown()}\n"


def errors() -> str:
    """Every code."""
    rows = [
        f'| <a id="{name}"></a>`{name}` | {code.exit_code} | {code.meaning} | {code.hint or "-"} |'
        for name, code in codes.CODES.items()
    ]
    return _table(("code", "exit", "meaning", "what to do"), rows)


def messages() -> str:
    """Every signed message with its fields, then the records inside them."""
    parts: dict[str, type[msgspec.Struct]] = {}
    blocks = []
    for name, kind in MESSAGES.items():
        head = f"#### `{name}`\n\n{_first_paragraph(kind)} At most {_size(kind.SIZE_MAX)}."
        blocks.append(f"{head}\n\n{_fields(kind, parts)}")
    done: set[str] = set()
    while left := [name for name in parts if name not in done]:
        done.add(left[0])
        part = parts[left[0]]
        blocks.append(f"#### {left[0]}\n\n{_first_paragraph(part)}\n\n{_fields(part, parts)}")
    return "\n".join(blocks)


def records() -> str:
    """What is not signed: stream headers and the receipt file."""
    kinds = (
        *(protocols.BlobHeader, protocols.BlobReply),
        *(protocols.AttachHeader, protocols.AttachReply, protocols.Resize),
        *(protocols.ContentHeader, protocols.ContentParts, protocols.ContentPart),
        *(receipt.ReceiptBundle, receipt.LogProof),
    )
    blocks = [
        f"#### {kind.__name__}\n\n{_first_paragraph(kind)}\n\n{_fields(kind, {})}" for kind in kinds
    ]
    return "\n".join(blocks)


def frame_kinds() -> str:
    """The kinds of frames."""
    return _table(("kind", "number"), [f"| `{kind.name}` | {int(kind)} |" for kind in Kind])


def bounds() -> str:
    """Every limit of the protocol with the comment that stands above it."""
    source = Path(limits.__file__).read_text(encoding="utf-8")
    lines, rows = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("KIB", "MIB", "GIB"):
                continue
            why = _comment_above(lines, node.lineno - 1) or _comment_at(lines, node)
            rows.append(f"| `{name}` | {getattr(limits, name):,} | {why} |")
    return _table(("limit", "value", "why"), rows)


def endpoints() -> str:
    """The coordinator's HTTP interface."""
    rows = []
    for router in ROUTERS:
        rows += _routes(router)
    return _table(("request", "answer"), rows)


def commands() -> str:
    """The help of every command."""
    return "\n".join(
        f"{'###' if len(path) > 1 else '##'} `{' '.join(path)}`\n\n```text\n{_help(path)}\n```\n"
        for path, _ in walk()
    )


def node_settings() -> str:
    """The fields of node.toml."""
    rows = []
    for name, field in node_fields():
        default = msgspec.json.encode(field.default).decode()
        rows.append(f"| `{name}` | `{default}` | {NODE_MEANINGS[name]}{_range(field.type)} |")
    _same("node.toml", {name for name, _ in node_fields()}, NODE_MEANINGS)
    return _table(("setting", "default", "meaning"), rows)


def coordinator_settings() -> str:
    """The coordinator's settings."""
    rows = []
    for field in dataclasses.fields(Settings):
        flag = COORDINATOR_FLAGS.get(field.name)
        default = "" if field.default is dataclasses.MISSING else f"`{field.default}`"
        meaning = STATE_MEANING if field.name == "state" else MEANINGS[field.name]
        rows.append(
            f"| `{field.name}` | {f'`{flag}`' if flag else '-'} | {default or '-'} |"
            f" {meaning.replace(chr(10) + '# ', ' ')} |"
        )
    return _table(("setting", "flag", "default", "meaning"), rows)


def environment() -> str:
    """Every environment variable that the source reads."""
    _same("environment", environment_names(), ENVIRONMENT_MEANINGS)
    rows = [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT_MEANINGS.items()]
    return _table(("variable", "meaning"), rows)


PARTS: Final[dict[str, Callable[[], str]]] = {
    "quote-desk": lambda: machine(desk.QUOTE),
    "buyer-session": lambda: machine(buyer.BUYER_SESSION),
    "seller-session": lambda: machine(seller.SELLER_SESSION),
    "job": lambda: machine(job.JOB),
    "escrow": lambda: machine(escrow.ESCROW),
    "dispute": lambda: machine(dispute.DISPUTE),
    "errors": errors,
    "messages": messages,
    "records": records,
    "frames": frame_kinds,
    "limits": bounds,
    "endpoints": endpoints,
    "commands": commands,
    "node-settings": node_settings,
    "coordinator-settings": coordinator_settings,
    "environment": environment,
}


# --- what the source holds ---


def walk(
    command: click.Command = root, path: tuple[str, ...] = ("lumaris",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, f"{name} is listed and missing"
            yield from walk(found, (*path, name))


def node_fields(
    kind: type[msgspec.Struct] = NodeConfig, prefix: str = ""
) -> Iterator[tuple[str, inspect.Field]]:
    """Every setting of node.toml by its dotted name."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        if isinstance(field.type, inspect.StructType):
            yield from node_fields(field.type.cls, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def environment_names() -> set[str]:
    """Every LUMARIS_ name in the source, and those written with the prefix apart."""
    found = set()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", "") and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                found |= set(re.findall(r"\bLUMARIS_[A-Z_]*[A-Z]\b", text))
                found |= {f"LUMARIS_{name}" for name in re.findall(r"\{_PREFIX\}([A-Z_]+)", text)}
    return found


def render(text: str) -> str:
    """A page with its generated parts as they should be."""

    def replace(match: re.Match[str]) -> str:
        return f"{match['open']}\n{PARTS[match['name']]().strip()}\n\n{match['close']}"

    return _BLOCK.sub(replace, text)


def pages(folder: Path = FOLDER) -> list[Path]:
    """The pages that may hold generated parts."""
    return sorted(folder.glob("*.md"))


def main(arguments: list[str], folder: Path = FOLDER) -> int:
    """Rewrite the pages, or with `--check` exit with 1 when one is stale."""
    stale = []
    for page in pages(folder):
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(after, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'stale; run `make docs`' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


# --- details ---


def _table(headers: tuple[str, ...], rows: list[str]) -> str:
    head = f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}\n"
    return head + "\n".join(rows) + "\n"


def _fields(kind: type[msgspec.Struct], parts: dict[str, type[msgspec.Struct]]) -> str:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    rows = []
    for field in info.fields:
        default = ""
        if not field.required:
            made = field.default
            if made is msgspec.NODEFAULT and callable(field.default_factory):
                made = field.default_factory()
            default = f"`{msgspec.json.encode(made).decode()}`"
        shown = _type(field.type, parts)
        if shown == "count" and field.encode_name.endswith("_nanos"):
            shown = "nanos"
        rows.append(f"| `{field.encode_name}` | {shown} | {default} |")
    return _table(("field", "type", "default"), rows)


def _type(kind: inspect.Type, parts: dict[str, type[msgspec.Struct]]) -> str:
    if isinstance(kind, inspect.StructType):
        parts.setdefault(kind.cls.__name__, kind.cls)
        return f"[{kind.cls.__name__}](#{kind.cls.__name__.lower()})"
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f'`"{value}"`' for value in kind.values)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_type(member, parts) for member in kind.types)
    for named, name in _TYPES.items():
        if inspect.type_info(named) == kind:
            return name
    if isinstance(kind, inspect.VarTupleType):
        return f"list{_range(kind)} of {_type(kind.item_type, parts)}"
    if isinstance(kind, inspect.DictType):
        return (
            f"map{_range(kind)} of {_type(kind.key_type, parts)} to {_type(kind.value_type, parts)}"
        )
    if isinstance(kind, inspect.NoneType):
        return "null"
    name = type(kind).__name__.removesuffix("Type").lower()
    return {"str": "text", "bytes": "base64"}.get(name, name) + _range(kind)


def _range(kind: Any) -> str:
    found = []
    for name, word in (("ge", ">="), ("le", "<="), ("min_length", ">="), ("max_length", "<=")):
        value = getattr(kind, name, None)
        if value is not None:
            found.append(f"{word} {value:,}")
    return f" ({', '.join(found)})" if found else ""


def _size(count: int) -> str:
    return f"{count:,} bytes"


def _first_paragraph(thing: Any) -> str:
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def _comment_above(lines: list[str], index: int) -> str:
    found: list[str] = []
    while (
        index > 0 and lines[index - 1].startswith("# ") and not lines[index - 1].startswith("# -")
    ):
        index -= 1
        found.insert(0, lines[index].removeprefix("# "))
    return " ".join(found)


def _comment_at(lines: list[str], node: ast.Assign) -> str:
    """A comment behind the value, which may stand inside its brackets."""
    text = " ".join(lines[node.lineno - 1 : node.end_lineno])
    found = re.search(r"  # (.*?)\s*\)?$", text)
    return found[1] if found else ""


def _routes(router: Any) -> list[str]:
    return [
        f"| `{method} {route.path}` | {_first_paragraph(route.endpoint)} |"
        for route in router.routes
        for method in sorted(getattr(route, "methods", ("WS",)))
    ]


def _help(path: tuple[str, ...]) -> str:
    context: click.Context | None = None
    command: click.Command = root
    for word in path:
        if context is not None:
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
        context = click.Context(
            command,
            context,
            info_name=word,
            terminal_width=_HELP_WIDTH,
            max_content_width=_HELP_WIDTH,
            **_help_names(command),
        )
    assert context is not None
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _help_names(command: click.Command) -> dict[str, Any]:
    names = command.context_settings.get("help_option_names")
    return {"help_option_names": names} if names else {}


def _same(what: str, found: set[str], described: dict[str, Any]) -> None:
    if odd := found ^ set(described):
        raise SystemExit(f"docs/generate.py: {what}: describe, or drop, {', '.join(sorted(odd))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
