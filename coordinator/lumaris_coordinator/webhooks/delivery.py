"""Carrying events to their endpoints: at least once, in order, by one process at a time.

An endpoint's place in the outbox is a column, moved on after each answer of 2xx; what follows the
place is what waits, so nothing can be lost that the outbox holds. A lease row keeps replicas from
delivering side by side; it runs out with its process. An event that fails is tried again, ever
more rarely, and holds up those behind it. When it has failed for three days it is a dead letter
and its endpoint is disabled; a replay by the owner goes on from any place, that event's included.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio

from lumaris_coordinator.bounds import (
    WEBHOOK_GIVE_UP_S,
    WEBHOOK_RETRY_S_MAX,
    WEBHOOK_RETRY_S_MIN,
    WEBHOOK_ROUND_S,
    WEBHOOK_SLOW_S,
    WEBHOOK_TURN_MAX,
    WEBHOOK_TURN_S_MAX,
    WEBHOOKS_CONCURRENT_MAX,
    WEBHOOKS_CONCURRENT_PER_PRINCIPAL_MAX,
    WEBHOOKS_DUE_PER_ROUND_MAX,
    WEBHOOKS_MAX,
    WEBHOOKS_SLOW_CONCURRENT_MAX,
)
from lumaris_coordinator.events import outbox
from lumaris_coordinator.events.outbox import Event
from lumaris_coordinator.sealing import Sealer
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.webhooks import signing, store
from lumaris_coordinator.webhooks.outgoing import Post, Sender, UnreachableError
from lumaris_coordinator.webhooks.principals import parties_of_principal, principals_of_parties
from lumaris_coordinator.webhooks.store import Webhook
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

_GONE: Final = 410


@dataclass(frozen=True)
class Attempt:
    """One delivery that was tried. `outcome` is `delivered` or why not."""

    event: int
    number: int
    at: int
    outcome: str
    status: int | None
    took_ms: int


def retry_after(failures: int, *, chance: float) -> int:
    """Seconds until the next attempt after so many failures: doubled each time, up to a bound,
    and spread by `chance` (0 to 1) so that endpoints that failed together do not return together.
    """
    longest = min(WEBHOOK_RETRY_S_MAX, WEBHOOK_RETRY_S_MIN << min(failures - 1, 20))
    return max(1, round(longest * (0.5 + chance / 2)))


class Deliveries:
    """The task that delivers. `wake` it when an endpoint may have become due."""

    def __init__(
        self, context: Context, sender: Sender, *, chance: Callable[[], float] = random.random
    ) -> None:
        self._context, self._sender, self._chance = context, sender, chance
        self._sealer = Sealer(context.keys.first.seed)
        self._woken = anyio.Event()
        self._heard: set[str] = set()
        # Endpoints by name, each with its principal.
        self._waiting: OrderedDict[str, str] = OrderedDict()
        self._busy: dict[str, str] = {}
        self._slow: OrderedDict[str, None] = OrderedDict()

    def wake(self) -> None:
        """Look at what is due without waiting for the round."""
        self._woken.set()

    def hear(self, events: Sequence[Event]) -> None:
        """New events; a listener of the hub."""
        for event in events:
            self._heard.update(event.parties)
        self.wake()

    async def run(self) -> None:
        """Deliver until cancelled."""
        await self._begin()
        async with anyio.create_task_group() as tasks:
            while True:
                with anyio.move_on_after(WEBHOOK_ROUND_S):
                    await self._woken.wait()
                self._woken = anyio.Event()
                try:
                    await self._collect()
                except Exception:
                    log.exception("the due webhooks could not be read; they are tried again")
                    await anyio.sleep(WEBHOOK_ROUND_S)
                for name in self._next():
                    self._busy[name] = self._waiting.pop(name)
                    tasks.start_soon(self._serve, name)

    def _next(self) -> list[str]:
        """Whose turn it is: those of one owner, and the slow ones, leave places to all others."""
        owners, found = Counter(self._busy.values()), list[str]()
        slow = sum(name in self._slow for name in self._busy)
        for name, owner in self._waiting.items():
            if len(self._busy) + len(found) >= WEBHOOKS_CONCURRENT_MAX:
                break
            is_slow = name in self._slow
            crowded = owners[owner] >= WEBHOOKS_CONCURRENT_PER_PRINCIPAL_MAX
            if crowded or name in self._busy or (is_slow and slow >= WEBHOOKS_SLOW_CONCURRENT_MAX):
                continue
            owners[owner] += 1
            slow += is_slow
            found.append(name)
        return found

    async def _begin(self) -> None:
        """What was committed while nobody listened."""
        behind = await self._context.store.read(
            lambda connection: store.idle_behind(connection, head=outbox.head(connection))
        )
        self._waiting.update(behind)

    async def _collect(self) -> None:
        heard, self._heard = self._heard, set()
        now = self._context.now()

        def look(connection: Connection) -> dict[str, str]:
            concerned = principals_of_parties(connection, heard)
            return {
                **store.of_principals(connection, concerned),
                **store.due(connection, now=now, limit=WEBHOOKS_DUE_PER_ROUND_MAX),
            }

        self._waiting.update(await self._context.store.read(look))

    async def _serve(self, name: str) -> None:
        begun = anyio.current_time()
        try:
            again = await self.turn(name)
        except LumarisError as error:
            log.warning("webhook %s: %s", name, error)
        except Exception:
            log.exception("webhook %s failed; its lease runs out and it is tried again", name)
        else:
            if again:
                self._waiting[name] = self._busy[name]
        finally:
            self._note_pace(name, anyio.current_time() - begun)
            del self._busy[name]
            # What has just failed waits for the round; a free place is for those who wait.
            if self._waiting:
                self.wake()

    def _note_pace(self, name: str, took_s: float) -> None:
        self._slow.pop(name, None)
        if took_s > WEBHOOK_SLOW_S:
            self._slow[name] = None
            if len(self._slow) > WEBHOOKS_MAX:
                self._slow.popitem(last=False)

    async def turn(self, name: str) -> bool:
        """Deliver up to WEBHOOK_TURN_MAX events to an endpoint, for a bounded time; whether more
        wait."""
        context, lease = self._context, secrets.token_hex(8)
        if not await context.store.read(
            lambda connection: _is_ready(connection, name, context.now())
        ):
            return False
        webhook = await context.store.submit(
            lambda connection: store.take(connection, name, lease=lease, now=context.now())
        )
        if webhook is None:
            return False
        try:
            secret = self._sealer.open(webhook.secret).decode()
        except LumarisError:
            await self._give_up(webhook, lease, "secret_lost")
            return False
        events = await context.store.read(lambda connection: _pending(connection, webhook))
        seen = webhook.seen
        failed = webhook.failures
        wanted = [event for event in events if webhook.wants(event.kind)]
        if wanted:
            try:
                async with self._sender.open(webhook.url) as post:
                    ends = anyio.current_time() + WEBHOOK_TURN_S_MAX
                    for event in wanted:
                        if anyio.current_time() > ends:
                            return await self._finish(name, lease, before=seen, seen=seen)
                        attempt = await self._attempt(post, secret, event, failed + 1)
                        if not await self._record(webhook, lease, seen, attempt):
                            return False
                        seen, failed = event.id, 0
            except UnreachableError as error:
                missed = Attempt(
                    wanted[0].id, failed + 1, context.now(), error.reason, status=None, took_ms=0
                )
                await self._record(webhook, lease, seen, missed)
                return False
        return await self._finish(name, lease, before=seen, seen=max([seen, *_ids(events)]))

    async def _attempt(self, post: Post, secret: str, event: Event, number: int) -> Attempt:
        body, now = event.encode(), self._context.now()
        headers = {
            "content-type": "application/json",
            "user-agent": "lumaris-webhooks/1",
            **signing.sign(secret, message_id=f"evt_{event.id}", timestamp=now, body=body),
        }
        begun, status = time.monotonic(), None
        try:
            status = await post(body, headers)
            outcome = "delivered" if 200 <= status < 300 else "refused"
        except UnreachableError as error:
            outcome = error.reason
        took_ms = round((time.monotonic() - begun) * 1_000)
        return Attempt(event.id, number, now, outcome, status, took_ms)

    async def _record(self, webhook: Webhook, lease: str, seen: int, attempt: Attempt) -> bool:
        """Keep what came of an attempt; whether to go on with the next event."""
        now, chance = self._context.now(), self._chance()

        def operation(connection: Connection) -> bool:
            found = store.find(connection, webhook.id)
            if found is None:  # deleted meanwhile
                return False
            if attempt.outcome == "delivered":
                return _note(connection, webhook.id, attempt, attempt.outcome) and store.advance(
                    connection, webhook.id, lease=lease, before=seen, seen=attempt.event, now=now
                )
            since = found.failing_since if found.failing_since is not None else now
            gone = attempt.status == _GONE
            if gone or now - since >= WEBHOOK_GIVE_UP_S:
                _note(connection, webhook.id, attempt, "gone" if gone else "dead")
                reason = "gone" if gone else f"dead letter: event {attempt.event}"
                store.disable(connection, webhook.id, lease=lease, reason=reason)
                return False
            _note(connection, webhook.id, attempt, attempt.outcome)
            due_at = now + retry_after(attempt.number, chance=chance)
            store.put_off(connection, webhook.id, lease=lease, due_at=due_at, now=now, failed=True)
            return False

        return await self._context.store.submit(operation)

    async def _give_up(self, webhook: Webhook, lease: str, reason: str) -> None:
        await self._context.store.submit(
            lambda connection: store.disable(connection, webhook.id, lease=lease, reason=reason)
        )

    async def _finish(self, name: str, lease: str, *, before: int, seen: int) -> bool:
        """Give the lease back; whether there is more. Asked in the same transaction, so an event
        that is committed meanwhile is not forgotten."""
        now = self._context.now()

        def operation(connection: Connection) -> bool:
            if seen != before and not store.advance(
                connection, name, lease=lease, before=before, seen=seen, now=now
            ):
                return False
            more = _has_work(connection, name)
            store.put_off(
                connection, name, lease=lease, due_at=now if more else None, now=now, failed=False
            )
            return more

        return await self._context.store.submit(operation)


def _note(connection: Connection, webhook: str, attempt: Attempt, outcome: str) -> bool:
    store.add_delivery(
        connection,
        webhook,
        event=attempt.event,
        attempt=attempt.number,
        at=attempt.at,
        outcome=outcome,
        status=attempt.status,
        took_ms=attempt.took_ms,
    )
    return True


def _pending(connection: Connection, webhook: Webhook) -> list[Event]:
    parties = parties_of_principal(connection, webhook.principal)
    return outbox.newer_of(connection, parties, after=webhook.seen, limit=WEBHOOK_TURN_MAX)


def _is_ready(connection: Connection, name: str, now: int) -> bool:
    """Whether to take the lease. One that is due without work is taken to note just that."""
    return store.is_free(connection, name, now=now) and (
        store.is_due(connection, name, now=now) or _has_work(connection, name)
    )


def _has_work(connection: Connection, name: str) -> bool:
    webhook = store.find(connection, name)
    return webhook is not None and bool(_pending(connection, webhook))


def _ids(events: Sequence[Event]) -> list[int]:
    return [event.id for event in events]
