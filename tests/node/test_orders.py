"""How an order's machine ends, whatever the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lumaris_node.orders import OrderRun
from lumaris_protocol.codes import CODES
from lumaris_protocol.machines import job

# How the machine comes to each state in which an order can end.
PATHS = {
    "accepted": (),
    "preparing": ("prepare",),
    "ready": ("prepare", "prepared"),
    "running": ("prepare", "prepared", "start"),
    "paused": ("prepare", "prepared", "start", "pause"),
    "collecting": ("prepare", "prepared", "start", "exited_zero"),
}


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("state", PATHS)
def test_every_reason_ends_an_order(state: str, stopped: bool):
    """A session ends for any code, and its orders with it; no code may break the machine."""
    for reason in CODES:
        if reason == "succeeded":
            continue
        session = SimpleNamespace(
            machine=SimpleNamespace(failed=lambda *_, **__: []),
            apply=lambda effects: None,
            now=lambda: 0.0,
        )
        order = cast(Any, SimpleNamespace(n=1, job="job", limits=SimpleNamespace(log_bytes=0)))
        run = OrderRun(order, cast(Any, session), cast(Any, None), Path())
        run._stop_reason = reason if stopped else ""
        for fact in PATHS[state]:
            run.machine.take(fact)
        run._fail(reason, None)
        assert run.machine.state in ("failed", "killed", "error")
        assert run.machine.state in job.JOB.final
