"""Calling the command in this process and in its own, and what its failures must look like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from lumaris.cli.root import root

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
_PROCESS_S = 60


def call(*arguments: str | Path, state: Path | None = None, **options: Any) -> Result:
    """Run `lumaris` in this process."""
    env = {"LUMARIS_STATE": str(state) if state else None, "LUMARIS_COORDINATOR_URL": NOBODY}
    found = CliRunner(env=env).invoke(root, [str(word) for word in arguments], **options)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def spawn(*arguments: str | Path, state: Path) -> subprocess.CompletedProcess[str]:
    """Run `lumaris` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lumaris.cli", *map(str, arguments)],
        env={**os.environ, "LUMARIS_STATE": str(state), "LUMARIS_COORDINATOR_URL": NOBODY},
        capture_output=True,
        text=True,
        timeout=_PROCESS_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def assert_one_message(stderr: str, code: str) -> None:
    """One error with its code and a next step, no trace, nothing else that looks like a failure."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error[")]
    assert len(errors) == 1, stderr
    assert errors[0].startswith(f"error[{code}] "), stderr
    assert sum(line.startswith("next: ") for line in lines) <= 1
    assert "Traceback" not in stderr


def json_of(found: Result) -> Any:
    """The one JSON document on stdout."""
    return json.loads(found.stdout)


def shape_of(value: Any) -> Any:
    """The names and kinds in a JSON document; a list is described by its first item."""
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value[:1]]
    return None if value is None else type(value).__name__


ERROR_SHAPE = {"error": {"code": "str", "message": "str", "hint": "str", "money_moved": "bool"}}
