"""Who may import whom, and what the protocol may not touch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lumaris_protocol

ROOT = Path(__file__).parents[1]
PROTOCOL = Path(lumaris_protocol.__file__).parent
FORBIDDEN = {
    *("trio", "socket", "time", "random", "secrets", "os", "pathlib", "httpx", "libp2p"),
    *("sqlite3", "sqlite_utils", "datetime", "asyncio", "threading", "subprocess", "uuid"),
    *("tempfile", "shutil", "logging", "pickle", "select", "ssl", "io"),
}
# Code that reads a clock, a file or dice without an import of its own.
FORBIDDEN_CALLS = {"open", "eval", "exec", "compile", "__import__", "input", "print"}
files = pytest.mark.parametrize(
    "path", sorted(PROTOCOL.rglob("*.py")), ids=lambda path: str(path.relative_to(PROTOCOL))
)


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield (node.module or "").partition(".")[0]


@files
def test_the_protocol_does_no_io(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not set(imports_of(tree)) & FORBIDDEN
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & FORBIDDEN_CALLS
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))


@files
def test_the_protocol_builds_on_three_libraries(path: Path) -> None:
    outside = {
        name
        for name in imports_of(ast.parse(path.read_text(encoding="utf-8")))
        if name not in sys.stdlib_module_names
    }
    assert outside <= {"lumaris_protocol", "msgspec", "nacl"}


@pytest.mark.slow
def test_importing_the_protocol_loads_nothing_heavy() -> None:
    modules = [
        ".".join(path.relative_to(PROTOCOL.parent).with_suffix("").parts)
        for path in sorted(PROTOCOL.rglob("*.py"))
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {"trio", "httpx", "libp2p", "sqlite3", "asyncio", "docker", "rich", "click", "pydantic"}
    heavy |= {"lumaris", "lumaris_overlay", "lumaris_node", "lumaris_coordinator", "socket"}
    assert not set(done.stdout.split()) & heavy


@pytest.mark.slow
def test_the_import_contracts_hold() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [str(tool), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
