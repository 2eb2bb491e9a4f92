"""Log lines: text for people, or one JSON object a line; one line a request when asked.

A request's line names its route by template. Tokens, bodies and query strings are in no line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final, Literal

Format = Literal["text", "json"]

ACCESS: Final = logging.getLogger("lumaris_coordinator.access")
# Line breaks in a message could pass for another line.
_LINE_BREAKS: Final = str.maketrans({"\n": "\\n", "\r": "\\r", "\u2028": " ", "\u2029": " "})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what `extra={"fields": …}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=True, default=str)


class TextLines(logging.Formatter):
    """The level and the message; a request's fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it."""
        fields = getattr(record, "fields", {})
        told = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{record.levelname} {record.getMessage().translate(_LINE_BREAKS)}{told}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(*, form: Format, requests: bool) -> None:
    """Log to stderr: warnings and worse, and each request when `requests`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    ACCESS.setLevel(logging.INFO if requests else logging.WARNING)
    # httpx would log every webhook's whole URL, which may hold its owner's token.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_request(
    *, method: str, route: str, status: int, took_ms: float, request_id: str, trace_id: str
) -> None:
    """One request's line; costs nothing while it is not asked for."""
    if ACCESS.isEnabledFor(logging.INFO):
        ACCESS.info(
            "request",
            extra={
                "fields": {
                    "method": method,
                    "route": route,
                    "status": status,
                    "ms": round(took_ms, 2),
                    "request_id": request_id,
                    "trace_id": trace_id,
                }
            },
        )
