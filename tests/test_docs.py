"""The documentation says what the code says: generated parts, names, commands, links, settings."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import msgspec
import pytest

from lumaris.cli.options import Settings
from lumaris.cli.root import root
from lumaris_node.config import NodeConfig
from lumaris_node.egress import policy
from lumaris_protocol import limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.codes import CODES
from lumaris_protocol.messages.advert import Feature, Tier
from lumaris_protocol.registry import MESSAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*)`")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(*names: str) -> str:
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def commands_in(text: str) -> list[str]:
    """The `lumaris ...` lines of fenced shell blocks."""
    found = []
    for language, body in _FENCE.findall(text):
        if language in ("sh", "console"):
            lines = (line.removeprefix("$ ") for line in body.splitlines())
            found += [line for line in lines if line.startswith("lumaris ")]
    return found


def parse(words: list[str]) -> click.Command:
    """Parse a command line without running it; the command it calls."""
    command: click.Command = root
    context = command.make_context("lumaris", list(words), obj=Settings())
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert name is not None
        assert found is not None
        command = found
        context = command.make_context(name, rest, parent=context)
    return command


def anchors_of(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.slow
def test_the_generated_parts_are_current() -> None:
    assert generate.main(["--check"]) == 0, "run `make docs`"


@pytest.mark.slow
def test_a_stale_page_is_noticed_and_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "errors.md"
    shutil.copy(DOCS / "errors.md", page)
    before = page.read_text(encoding="utf-8")
    page.write_text(before.replace("| `no_offers` |", "| `no_offer` |").replace("Add its", "Ad"))
    assert generate.main(["--check"], tmp_path) == 1
    assert generate.main([], tmp_path) == 0
    assert page.read_text(encoding="utf-8") == before


def test_every_generated_part_is_shown_once() -> None:
    shown = re.findall(r"<!-- generated:([a-z-]+) -->", "".join(page.read_text() for page in PAGES))
    assert sorted(shown) == sorted(generate.PARTS)


def test_every_command_is_documented() -> None:
    text = text_of("docs/cli.md")
    paths = [" ".join(path) for path, _ in generate.walk()]
    assert [path for path in paths if f"`{path}`" not in text] == []
    assert len(paths) > 10


def test_every_code_is_documented() -> None:
    text = text_of("docs/errors.md")
    assert [code for code in CODES if f"`{code}`" not in text] == []


def test_every_message_is_documented() -> None:
    text = text_of("docs/protocol.md")
    assert [name for name in MESSAGES if f"#### `{name}`" not in text] == []


@pytest.mark.slow  # loads libp2p
def test_every_protocol_id_and_unsigned_field_is_documented() -> None:
    from lumaris_overlay.advert_filter import AdvertFilter
    from lumaris_overlay.libp2p import circuit, dht_wire, gossip, hello, index, punch, reach
    from lumaris_overlay.links import wire
    from lumaris_protocol import protocols

    text = text_of("docs/protocol.md")
    constants = [value for name, value in vars(protocols).items() if name.isupper()]
    names = [value for value in constants if isinstance(value, str)]
    names += [index.PROTOCOL, reach.PROTOCOL, punch.PROTOCOL, circuit.HOP, *gossip._PROTOCOLS]
    names += [
        dht_wire.protocol_of("<network>"),
        *(f"/lumaris/<network>/{kind}/<shard>" for kind in (gossip.ADVERTS, gossip.DEMANDS)),
    ]
    assert [name for name in names if f"`{name}`" not in text] == []
    spoken = text[text.index("## The network") : text.index("## Money")]
    kinds: tuple[type[msgspec.Struct], ...] = (
        *(hello.Greeting, index.Query, index.Answer, AdvertFilter, reach.Ask, reach.Answer),
        *(wire.Attach, wire.Attached, wire.Resumed, wire.Target, wire.Address),
        *(protocols.TenderHeader, protocols.AttachHeader, protocols.AttachReply, protocols.Resize),
        *(protocols.ContentHeader, protocols.ContentPart, protocols.ContentParts),
    )
    fields = {name for kind in kinds for name in kind.__struct_encode_fields__}
    assert [f for f in sorted(fields) if f"`{f}`" not in spoken and f'"{f}"' not in spoken] == []
    frames = [f"| `{kind.name}` | {int(kind)} |" for kind in wire.Kind]
    assert [row for row in frames if row not in spoken] == []


def test_the_waits_of_a_link_are_the_documented_ones() -> None:
    text = text_of("docs/protocol.md")
    life = text[text.index("**Signs of life.** With a lane") : text.index("A program answers")]
    waits = (limits.LINK_PING_S, limits.LINK_DEAD_S, limits.LINK_RESUME_S, limits.LINK_IDLE_S)
    assert [f"{s:g} s" for s in (*waits, 2 * limits.LINK_IDLE_S)] == re.findall(r"[\d.]+ s\b", life)


def test_every_vector_file_is_named_in_the_protocol() -> None:
    text = text_of("docs/protocol.md")
    names = [path.name for path in (ROOT / "tests" / "vectors").glob("*.json")]
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_every_setting_is_documented() -> None:
    text = text_of("docs/settings.md")
    names = [name for name, _ in generate.node_fields()]
    names += [field.name for field in generate.dataclasses.fields(generate.Settings)]
    assert [name for name in names if f"| `{name}` |" not in text] == []


def test_every_environment_variable_is_documented() -> None:
    text = text_of("docs/settings.md")
    names = generate.environment_names()
    assert {"LUMARIS_STATE", "LUMARIS_OVERLAY_LINGER_S"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    "line", sorted({line for page in PAGES for line in commands_in(page.read_text())})
)
def test_commands_in_the_docs_parse(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    for word in words:
        if word.endswith(".tar"):
            Path(word).touch()  # such a file must exist
    parse(words)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(click.UsageError):
        parse(["wallet", "empty"])
    with pytest.raises(click.UsageError):
        parse(["run", "--no-such", "image", "command"])


def test_the_samples_of_node_toml_are_valid() -> None:
    text = text_of("docs/settings.md", "docs/execution.md")
    samples = [body for language, body in _FENCE.findall(text) if language == "toml"]
    for sample in samples:
        config = msgspec.toml.decode(sample, type=NodeConfig)
        config.price.table()
        policy.check_patterns(config.accept.egress)
    assert len(samples) > 2


@pages
def test_samples_of_python_make_the_requests_they_show(page: Path) -> None:
    for language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            tree = ast.parse(body)
            kept = (ast.Import, ast.ImportFrom, ast.Assign)
            tree.body = [node for node in tree.body if isinstance(node, kept)]
            exec(compile(tree, page.name, "exec"), {})


def test_reasons_and_features_of_execution_are_the_known_ones() -> None:
    text = text_of("docs/execution.md")
    killed = {name for name in CODES if name.startswith("killed_")}
    assert set(re.findall(r"`(killed_\w+)`", text)) == killed
    table = text[text.index("| tier | is | needs") : text.index("| tier | a start costs")]
    assert [name for name in get_args(Feature) if f"`{name}`" not in table] == []
    assert [name for name in get_args(Tier) if f"| `{name}` |" not in table] == []
    for image in CATALOG:
        assert f"`{image}`" in text
    bounds = (limits.PIDS_DEFAULT, limits.PIDS_MAX, limits.SCRATCH_FILES_MAX, limits.OPEN_FILES_MAX)
    rows = text[text.index("| limit | default") : text.index("The reasons come")]
    assert [count for count in bounds if f"{count:,}" not in rows] == []


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b[ `\n]", text_of("README.md", "CONTRIBUTING.md")))
    assert {"demo", "test"} <= named & targets
    assert set(re.findall(r"`make ([a-z]+)", text_of("CONTRIBUTING.md"))) <= targets


@pages
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        missing = not target.exists() or (anchor and anchor not in anchors_of(target))
        if missing:
            broken.append(link)
    assert broken == []


def test_paths_in_contributing_exist() -> None:
    named = _PATH.findall(text_of("CONTRIBUTING.md"))
    bases = (ROOT, ROOT / "protocol/lumaris_protocol", ROOT / "coordinator/lumaris_coordinator")
    missing = [name for name in named if not any(list(base.glob(name)) for base in bases)]
    assert missing == []


@pages
def test_no_page_names_a_machine_of_its_author(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"/tmp/\w|/root/|/home/\w+", text) == []
