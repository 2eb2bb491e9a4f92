"""W3C trace context: a caller's `traceparent` is gone on with, or a trace is begun."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final

# version "-" trace-id "-" parent-id "-" flags; later versions may append, and ff is no version.
_HEADER: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_CHARS_MAX: Final = 256


@dataclass(frozen=True)
class Trace:
    """Where in which trace a request is. `parent` is empty where the trace begins here."""

    trace_id: str
    span_id: str
    parent: str
    flags: str

    @property
    def traceparent(self) -> str:
        """The header that names this span."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def trace_of(traceparent: str | None) -> Trace:
    """This program's span of the caller's trace; a header that is none begins a new trace."""
    drawn = secrets.token_hex(24)  # at once: each draw lets go of the interpreter
    span = drawn[:16]
    given = traceparent or ""
    found = _HEADER.fullmatch(given) if len(given) <= _CHARS_MAX else None
    if found is not None:
        version, trace, parent, flags, more = found.groups()
        if (version != "00" or more is None) and int(trace, 16) and int(parent, 16):
            return Trace(trace, span, parent, flags if version == "00" else "00")
    return Trace(drawn[16:], span, "", "00")
