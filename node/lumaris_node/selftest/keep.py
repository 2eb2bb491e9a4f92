"""Which tiers may be offered: those whose attacks were held off lately, and were seen to be.

A report is kept in the state folder. It stands for a day, for one version of the tier and of the
suite, and for one boot; a tier that was gone is attacked again before it is offered again. Attacks
that a busy machine was too slow to show are repeated soon, and prove nothing against a report that
stands.
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
from lumaris_node.selftest.rows import SUITE_VERSION, Row
from lumaris_node.selftest.suite import Report
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Runtime

log = logging.getLogger(__name__)

FILE = "selftest.json"
FOLDER = "selftest"
STANDS_S = 24 * 3600
# The attacks are repeated this early, so that a busy hour withdraws nothing.
RETEST_S = STANDS_S - 3600
# What the machine was too slow to show.
UNSHOWN_RETRY_S = 60
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
        self._not_before: dict[str, float] = {}  # when attacks that showed nothing are repeated
        self._boot = boot_id()
        self._forced: set[str] = set()
        self._broken: dict[str, str] = {}  # why attacks could not be run
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
        if self._is_due(runtime):
            async with self._turn:
                if self._is_due(runtime):
                    async with self._alone():
                        if self._is_due(runtime):  # another node's report may be here meanwhile
                            await self._attack(executor, runtime)
        return self.standing(runtime)

    def standing(self, runtime: Runtime) -> Runtime | None:
        """The runtime as its last report lets it be advertised; None when none does."""
        report = self._reports.get(runtime.tier)
        if report is None or not report.held or not self._is_of(report, runtime):
            return None
        if self._age_s(report) >= STANDS_S:
            return None
        return structs.replace(runtime, suite=report.suite, tested_at=report.at)

    def why_not(self, tier: str) -> str:
        """Why a tier that answers may not be advertised, for the owner."""
        report = self._reports.get(tier)
        if report is not None and report.failures:
            return f"Attacks succeeded: {_names(report.failures)}."
        if report is not None and report.unshown:
            return f"This machine was too slow to show that it holds: {_names(report.unshown)}."
        return self._broken.get(tier) or "Its self-test has not ended yet."

    def retest(self, tier: str) -> None:
        """Attack the tier at its next check, whatever was seen before; until then that stands."""
        self._forced.add(tier)
        self._not_before.pop(tier, None)

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

    async def _attack(self, executor: Executor, runtime: Runtime) -> None:
        """Attack the tier, and keep the report where it says more than what stands."""
        tier = runtime.tier
        self._forced.discard(tier)
        self._broken.pop(tier, None)
        try:
            report = await suite.run(executor, runtime, self._state / FOLDER, clock=self._clock)
        except LumarisError as error:
            log.warning("self-test not run tier=%s code=%s why=%s", tier, error.code, error.message)
            self._broken[tier] = f"Its self-test could not be run: {error.message}"
            if error.code == "timeout":
                self._not_before[tier] = self._clock() + UNSHOWN_RETRY_S
            else:
                self._reports.pop(tier, None)
            return
        _tell(report)
        if report.unshown and not report.failures:
            self._not_before[tier] = self._clock() + UNSHOWN_RETRY_S
            if self.standing(runtime) is not None:
                return
        self._reports[tier] = report
        await trio.to_thread.run_sync(self._write)

    def _is_due(self, runtime: Runtime) -> bool:
        tier, now = runtime.tier, self._clock()
        report = self._reports.get(tier)
        if tier in self._forced:
            return True
        if report is not None and not self._is_of(report, runtime):
            return True
        # A clock that was set back does not put it off for longer than that.
        if 0 < self._not_before.get(tier, 0) - now <= UNSHOWN_RETRY_S:
            return False
        if report is None:
            return True
        stands_s = RETRY_S if report.failures else UNSHOWN_RETRY_S
        return self._age_s(report) >= (RETEST_S if report.held else stands_s)

    def _is_of(self, report: Report, runtime: Runtime) -> bool:
        """Whether it says something of this tier as it is, at a time that was."""
        same = (report.version, report.assurance, report.suite) == (
            runtime.version,
            runtime.assurance,
            SUITE_VERSION,
        )
        return same and self._age_s(report) >= 0

    def _age_s(self, report: Report) -> float:
        return self._clock() - report.at

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
            if mine is not None and mine.held and report.unshown and not report.failures:
                continue  # it says nothing of what was seen
            if report.at > self._lost_at.get(tier, -1) and (mine is None or mine.at < report.at):
                self._reports[tier] = report

    def _write(self) -> None:
        data = msgspec.json.encode(_Kept(self._boot, self.reports))
        try:
            write_private_file(self._kept_in / FILE, data)
        except OSError as error:  # it is run again at the next start
            log.warning("self-test not saved error=%s", error.strerror)


def _tell(report: Report) -> None:
    for row in report.failures:
        log.warning(
            "self-test failed, tier not offered tier=%s row=%s detail=%s",
            report.tier,
            row.name,
            row.detail,
        )
    for row in report.unshown:
        log.warning("self-test not shown tier=%s row=%s", report.tier, row.name)
    log.info(
        "self-test tier=%s held=%s rows=%d seconds=%.1f",
        report.tier,
        report.held,
        len(report.rows),
        report.seconds,
    )


def _names(rows: tuple[Row, ...]) -> str:
    return ", ".join(row.name for row in rows)
