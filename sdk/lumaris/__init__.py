"""Rent compute from strangers, directly, with receipts anyone can check.

import lumaris

with lumaris.Client() as client:
    print(client.run("python:3.12-wasi", ["python", "-c", "print(6 * 7)"]).stdout)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumaris.client import AsyncClient, Client, make_request
    from lumaris.jobs import Artifact, JobRequest, JobResult, JobUpdate, LogLine, Plan
    from lumaris_protocol.errors import LumarisError

# Resolved on first use, so that importing the package (and `lumaris --help`) stays cheap.
_HOMES = {
    "Artifact": "lumaris.jobs",
    "AsyncClient": "lumaris.client",
    "Client": "lumaris.client",
    "JobRequest": "lumaris.jobs",
    "JobResult": "lumaris.jobs",
    "JobUpdate": "lumaris.jobs",
    "LogLine": "lumaris.jobs",
    "LumarisError": "lumaris_protocol.errors",
    "Plan": "lumaris.jobs",
    "make_request": "lumaris.client",
}

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "AsyncClient",
    "Client",
    "JobRequest",
    "JobResult",
    "JobUpdate",
    "LogLine",
    "LumarisError",
    "Plan",
    "make_request",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lumaris' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
