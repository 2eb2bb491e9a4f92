"""`lumaris node selftest`: attack the tiers of this machine and say what held."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio
from msgspec import structs, to_builtins

from lumaris_node import config
from lumaris_node.executors.port import Executor
from lumaris_node.images.manage import check_folder
from lumaris_node.selftest import suite
from lumaris_node.selftest.suite import Report
from lumaris_node.tiers import make_executor, why_not_sold
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Tier

# Marks what is ours while it is attacked; a node that runs meanwhile has another name.
_NAME = "selftest"


def run(state: Path, *, tier: Tier | None = None) -> list[dict[str, Any]]:
    """Attack the tiers that `node.toml` accepts, or one; see `attack`. Needs no running node.

    Raises LumarisError `config_invalid`, `not_found`, `usage`.
    """
    check_folder(state)
    settings = config.load(state)
    # What was compiled once is not compiled again; everything else is made for this alone.
    settings = structs.replace(settings, modules=settings.modules or str(state / "wasm"))
    return trio.run(_attack_all, state, settings, settings.accept.runtimes if not tier else (tier,))


async def _attack_all(
    state: Path, settings: config.NodeConfig, wanted: tuple[Tier, ...]
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=state, prefix="selftest-") as made:
        folder = Path(made)
        folder.chmod(0o711)
        executors: dict[str, Executor] = {}
        try:
            for tier in wanted:
                executors[tier] = await trio.to_thread.run_sync(
                    make_executor, tier, folder, settings, _NAME
                )
            return await attack(executors, folder)
        finally:
            with trio.CancelScope(shield=True):
                for executor in executors.values():
                    await executor.aclose()


async def attack(executors: Mapping[str, Executor], folder: Path) -> list[dict[str, Any]]:
    """A record for each tier: `held`, the rows, or why it was not attacked. Leaves no files."""
    found = []
    for tier, executor in executors.items():
        runtime = await executor.probe()
        why = why_not_sold(runtime, executor)
        if runtime is None or why:
            found.append(_absent(tier, "tier_unavailable", why))
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix="selftest-") as made:
            Path(made).chmod(0o711)
            try:
                report = await suite.run(executor, runtime, Path(made))
            except LumarisError as error:
                found.append(_absent(tier, error.code, error.message))
                continue
        found.append(_record(report, structs.asdict(runtime)))
    return found


def _record(report: Report, runtime: dict[str, Any]) -> dict[str, Any]:
    rows = sorted(to_builtins(report.rows), key=lambda row: row["name"])
    return {
        "tier": report.tier,
        "held": report.held,
        "version": report.version,
        "assurance": report.assurance,
        "features": list(runtime["features"]),
        "suite": report.suite,
        "tested_at": report.at,
        "seconds": report.seconds,
        "rows": rows,
    }


def _absent(tier: str, code: str, why: str) -> dict[str, Any]:
    return {"tier": tier, "held": None, "code": code, "why": why, "rows": []}
