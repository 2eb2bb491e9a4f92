"""A benchmark's rows: a table for people, or one JSON object."""

from __future__ import annotations

import json
from typing import Any


class Report:
    """Called with each row. `widths` are those of name, value, unit and bar; `digits` is shown."""

    def __init__(
        self, *, as_json: bool, widths: tuple[int, int, int, int] = (44, 12, 8, 12), digits: int = 3
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._as_json, self._widths, self._digits = as_json, widths, digits

    def __call__(
        self, name: str, value: float, unit: str, bar: str = "", holds: bool | None = None
    ) -> None:
        self.rows.append(
            {"name": name, "value": round(value, 3), "unit": unit, "bar": bar, "holds": holds}
        )
        if not self._as_json:
            mark = {True: "holds", False: "MISSED", None: ""}[holds]
            first, second, third, fourth = self._widths
            shown = f"{value:{second}.{self._digits}f}"
            print(f"{name:{first}} {shown} {unit:{third}} {bar:{fourth}} {mark}", flush=True)

    def finish(self) -> None:
        """Print the JSON object, if that is what was asked for."""
        if self._as_json:
            print(json.dumps({"rows": self.rows}))
