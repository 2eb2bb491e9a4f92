"""Containers that an engine kept after it had gone away."""

from __future__ import annotations

from typing import Any

from lumaris_node.executors.container.executor import ContainerExecutor
from lumaris_node.executors.container.sandbox import Sandbox


class Engine:
    """An engine that holds containers of ours."""

    def __init__(self, *held: str) -> None:
        self.held = list(held)

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        if method == "containers":
            assert named["filters"] == {"label": "lumaris.node=left"}
            return [{"Id": name} for name in self.held]
        assert method == "remove_container"
        self.held.remove(arguments[0])
        return None


async def test_only_what_belongs_to_no_sandbox_is_removed():
    executor = ContainerExecutor("left")
    engine = Engine("live", "stray")
    executor._engine = engine  # type: ignore[assignment]
    executor._live["live"] = Sandbox("live", {}, ())
    assert await executor.reap_left() == 0, "nothing went wrong"
    executor._left, executor._making = True, 1
    assert await executor.reap_left() == 0, "one that is being made is not known yet"
    executor._making = 0
    assert await executor.reap_left() == 1
    assert engine.held == ["live"]
