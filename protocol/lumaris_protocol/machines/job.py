"""The life of one order on a seller's machine.

The deadline and the bill both count from `running`; preparing is never billed.
"""

from __future__ import annotations

from typing import Final

from lumaris_protocol.machines.table import Row, Table

_ENDS: Final = (
    ("guest_failed", "failed"),
    ("limit_hit", "killed"),
    ("stopped", "killed"),
    ("platform_failed", "error"),
)


def _ends(state: str, *facts: str) -> tuple[Row, ...]:
    return tuple(
        Row(state, fact, end, "strike the order off the tab; destroy the sandbox")
        for fact, end in _ENDS
        if fact in facts
    )


JOB: Final = Table(
    "job",
    initial="accepted",
    final=("succeeded", "failed", "killed", "error"),
    rows=(
        Row("accepted", "prepare", "preparing", "stage inputs, ready the sandbox; not billed"),
        *_ends("accepted", "stopped", "platform_failed"),
        Row("preparing", "prepared", "ready", ""),
        *_ends("preparing", "guest_failed", "limit_hit", "stopped", "platform_failed"),
        Row("ready", "start", "running", "start the clock and the bill"),
        *_ends("ready", "stopped", "platform_failed"),
        Row("running", "pause", "paused", "freeze the sandbox, its clock and the bill"),
        Row("running", "exited_zero", "collecting", "stop the bill; hash the outputs"),
        *_ends("running", "guest_failed", "limit_hit", "stopped", "platform_failed"),
        Row("paused", "resume", "running", "continue"),
        # A guest may end in the moment it is frozen.
        Row("paused", "exited_zero", "collecting", "stop the bill; hash the outputs"),
        *_ends("paused", "guest_failed", "limit_hit", "stopped", "platform_failed"),
        Row("collecting", "collected", "succeeded", "sign the delivery"),
        *_ends("collecting", "limit_hit", "stopped", "platform_failed"),
    ),
)

# Which fact an end reason (a code) is for the machine.
_PLATFORM: Final = (
    "platform_error",
    "tier_unavailable",
    "prepare_timeout",
    "image_timeout",
    "volume_failed",
)
_STOPPED: Final = (
    "cancelled",
    "killed_owner",
    "shutting_down",
    "buyer_lost",
    "unpaid",
    "lease_ended",
    "budget_exceeded",
    "idle",
)
_GUEST: Final = (
    "exit_nonzero",
    "bad_image",
    "image_refused",
    "bad_command",
    "bad_input",
    "killed_trap",
)


def fact_of(reason: str) -> str:
    """The machine's fact for an order's end reason. Raises KeyError for a code that is none."""
    if reason == "succeeded":
        return "exited_zero"
    for fact, reasons in (
        ("platform_failed", _PLATFORM),
        ("stopped", _STOPPED),
        ("guest_failed", _GUEST),
    ):
        if reason in reasons:
            return fact
    if reason.startswith("killed_"):
        return "limit_hit"
    raise KeyError(reason)
