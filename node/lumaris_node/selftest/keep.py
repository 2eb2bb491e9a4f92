"""Which tiers may be offered: those whose attacks were held off lately, and were seen to be.

A report is kept in the state folder. It stands for a day, for one version of the tier and of the
suite, and for one boot; a tier that was gone is attacked again before it is offered again.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio
from msgspec import structs

from lumaris_node.capability.probe import boot_id
from lumaris_node.executors.port import Executor
from lumaris_node.selftest import suite
from lumaris_node.selftest.rows import SUITE_VERSION
from lumaris_node.selftest.suite import Report
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Runtime

log = logging.getLogger(__name__)

FILE = "selftest.json"
FOLDER = "selftest"
STANDS_S = 24 * 3600
# A tier that failed is tried again, for its owner may have mended it.
RETRY_S = 600
_FILE_BYTES_MAX = 1 << 20
_LOCK = "selftest.lock"
_TURN_S_MAX, _TURN_POLL_S = 3 * suite.RUN_S_MAX, 0.1


class _Kept(msgspec.Struct, frozen=True):
    boot: str
    reports: tuple[Report, ...]


class Assurance:
    """Decides what is offered. `reports` are the last ones, for the owner to read."""

    def __init__(
        self,
        state: Path,
        *,
        reports: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`reports` is where they are kept, the state folder by default.

        Nodes of one owner may share it: then one of them attacks, and the others wait and read.
        """
        self._state, self._clock = state, clock
        self._kept_in = reports or state
        self._reports: dict[str, Report] = {}
        self._lost_at: dict[str, int] = {}
        self._boot = boot_id()
        self._turn = trio.Lock()  # one attack at a time: it takes cores and memory
        self._read()

    @property
    def reports(self) -> tuple[Report, ...]:
        """The last report of each tier."""
        return tuple(self._reports[tier] for tier in sorted(self._reports))

    async def check(self, executor: Executor, runtime: Runtime) -> Runtime | None:
        """The runtime as it may be advertised, after attacking the tier if that is due.

        None when an attack succeeded or the attacks could not be run; the log says which.
        """
        async with self._turn:
            report = self._reports.get(runtime.tier)
            if report is None or self._is_due(report, runtime):
                async with self._alone():
                    report = self._reports.get(runtime.tier)  # another node's, made meanwhile
                    if report is None or self._is_due(report, runtime):
                        report = await self._attack(executor, runtime)
        if report is None or not report.held:
            return None
        return structs.replace(runtime, suite=report.suite, tested_at=report.at)

    def standing(self, runtime: Runtime) -> Runtime | None:
        """The runtime as an earlier report lets it be advertised; None when an attack is due."""
        report = self._reports.get(runtime.tier)
        if report is None or not report.held or self._is_due(report, runtime):
            return None
        return structs.replace(runtime, suite=report.suite, tested_at=report.at)

    def lost(self, tier: str) -> None:
        """The tier did not answer: when it is back, what was seen before does not count."""
        self._reports.pop(tier, None)
        self._lost_at[tier] = int(self._clock())

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One attack at a time among the nodes that keep their reports together."""
        with (self._kept_in / _LOCK).open("w") as file:
            with trio.move_on_after(_TURN_S_MAX):
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await trio.sleep(_TURN_POLL_S)
            self._read()
            yield  # past the deadline the attack is made twice rather than never

    async def _attack(self, executor: Executor, runtime: Runtime) -> Report | None:
        try:
            report = await suite.run(executor, runtime, self._state / FOLDER, clock=self._clock)
        except LumarisError as error:
            log.warning(
                "self-test not run tier=%s code=%s why=%s", runtime.tier, error.code, error.message
            )
            return None
        self._reports[runtime.tier] = report
        for row in report.failures:
            log.warning(
                "self-test failed, tier not offered tier=%s row=%s detail=%s",
                report.tier,
                row.name,
                row.detail,
            )
        log.info(
            "self-test tier=%s held=%s rows=%d seconds=%.1f",
            report.tier,
            report.held,
            len(report.rows),
            report.seconds,
        )
        await trio.to_thread.run_sync(self._write)
        return report

    def _is_due(self, report: Report, runtime: Runtime) -> bool:
        age_s = self._clock() - report.at
        stands_s = STANDS_S if report.held else RETRY_S
        same = (report.version, report.assurance, report.suite) == (
            runtime.version,
            runtime.assurance,
            SUITE_VERSION,
        )
        return not same or not 0 <= age_s < stands_s

    def _read(self) -> None:
        try:
            with (self._kept_in / FILE).open("rb") as file:
                kept = msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=_Kept)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return
        if kept.boot != self._boot:
            return
        for report in kept.reports:
            tier, mine = report.tier, self._reports.get(report.tier)
            if report.at > self._lost_at.get(tier, -1) and (mine is None or mine.at < report.at):
                self._reports[tier] = report

    def _write(self) -> None:
        data = msgspec.json.encode(_Kept(self._boot, self.reports))
        try:
            write_private_file(self._kept_in / FILE, data)
        except OSError as error:  # it is run again at the next start
            log.warning("self-test not saved error=%s", error.strerror)
