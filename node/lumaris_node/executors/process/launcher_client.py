"""The node's side of the launcher: hands it jobs."""

from __future__ import annotations

from pathlib import Path

from lumaris_node.executors.fork_server import ForkServer

STOP_S_MAX = 15  # it may have many groups to kill
LAUNCHER = "lumaris_node.executors.process.launcher"


class LauncherClient(ForkServer):
    """One launcher process."""

    def __init__(self, cgroup_root: Path) -> None:
        super().__init__(
            LAUNCHER,
            str(cgroup_root),
            name="launcher",
            stop_s_max=STOP_S_MAX,
            own_session=True,  # a terminal's interrupt is the node's to answer
        )

    async def start_job(self, group: str, descriptors: tuple[int, ...]) -> None:
        """Fork a job into a group that exists; the descriptors are those of `launcher.Given`.

        Raises LumarisError `tier_unavailable` without a launcher.
        """
        await self.call({"op": "start", "group": group}, descriptors)

    async def forget(self, group: str) -> None:
        """The group is gone."""
        await self.tell({"op": "forget", "group": group})
