"""Which bucket a request is taken from.

Every request is taken from its address's bucket until it shows credentials that hold; then from
theirs. So an address cannot hide behind invented tokens, and many users behind one address do not
share a bucket once they have logged in. What costs us a signature check, a password's hash or a row
for ever (the doors) has a smaller bucket besides.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Final

from lumaris_coordinator.bounds import (
    ADDRESS_BURST,
    ADDRESS_RATE,
    API_KEY_RATE_MAX,
    BUCKETS_MAX,
    CREDENTIAL_BURST_S,
    CREDENTIAL_RATE,
    DOOR_BURST,
    DOOR_RATE,
    LOGIN_FAILURES_BURST,
    LOGIN_FAILURES_PER_ADDRESS_BURST,
    LOGIN_FAILURES_PER_ADDRESS_RATE,
    LOGIN_FAILURES_PER_NAME_BURST,
    LOGIN_FAILURES_PER_NAME_RATE,
    LOGIN_FAILURES_RATE,
    REGISTRATION_BURST,
    REGISTRATION_RATE,
)
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.limits.gcra import Buckets, Outcome
from lumaris_protocol.errors import LumarisError

# Where strangers come in.
DOORS: Final = frozenset(
    (
        "/v1/users",
        "/v1/sessions",
        "/v1/identity/challenge",
        "/v1/identity/register",
        "/v1/identity/tls-certificate",
    )
)


# What costs us a few milliseconds and strangers nothing, in requests.
COSTS: Final = {"/v1/offers": 5, "/log/add-cosignature": 5}
# What a request is counted as when it comes from this machine itself, and when nobody can tell.
LOCAL: Final = "local"
UNKNOWN: Final = "unknown"


class Limiter:
    """All buckets of one process. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float], *, address_rate: float = ADDRESS_RATE) -> None:
        self._clock = clock
        factor = ADDRESS_BURST / ADDRESS_RATE
        burst = max(1, round(address_rate * factor))
        self._most = burst
        self._addresses = Buckets("address", rate=address_rate, burst=burst, size=BUCKETS_MAX)
        self._doors = Buckets("door", rate=DOOR_RATE, burst=DOOR_BURST, size=BUCKETS_MAX)
        self._registrations = Buckets(
            "registration", rate=REGISTRATION_RATE, burst=REGISTRATION_BURST, size=BUCKETS_MAX
        )
        self._credentials: dict[int, Buckets] = {}
        # Above the keys of one user, who chooses their number and their rates.
        self._holders = Buckets(
            "holder",
            rate=API_KEY_RATE_MAX,
            burst=API_KEY_RATE_MAX * CREDENTIAL_BURST_S,
            size=BUCKETS_MAX,
        )
        self._pairs = Buckets(
            "login", rate=LOGIN_FAILURES_RATE, burst=LOGIN_FAILURES_BURST, size=BUCKETS_MAX
        )
        self._login_addresses = Buckets(
            "login",
            rate=LOGIN_FAILURES_PER_ADDRESS_RATE,
            burst=LOGIN_FAILURES_PER_ADDRESS_BURST,
            size=BUCKETS_MAX,
        )
        self._login_names = Buckets(
            "login",
            rate=LOGIN_FAILURES_PER_NAME_RATE,
            burst=LOGIN_FAILURES_PER_NAME_BURST,
            size=BUCKETS_MAX,
        )

    def anonymous(self, address: str, path: str) -> Outcome:
        """A request from an address (`group_of`), before its credentials are looked at."""
        now = self._clock()
        if path in DOORS:
            at_door = self._doors.take(address, now=now)
            if not at_door.allowed:
                return at_door
            return min(self._addresses.take(address, now=now), at_door, key=_strictness)
        return self._addresses.take(address, now=now, cost=min(COSTS.get(path, 1), self._most))

    def known(self, caller: Caller, address: str) -> Outcome:
        """A request whose credentials hold: the address gets back what was taken from it."""
        now = self._clock()
        self._addresses.give_back(address, now=now)
        rate = caller.rate or CREDENTIAL_RATE
        buckets = self._credentials.get(rate)
        if buckets is None:
            # Rates are chosen from 1 to API_KEY_RATE_MAX, so there are few of these.
            buckets = self._credentials[rate] = Buckets(
                "credential", rate=rate, burst=rate * CREDENTIAL_BURST_S, size=BUCKETS_MAX
            )
        outcome = buckets.take(caller.counted_as, now=now)
        if not outcome.allowed or not caller.rate:
            return outcome
        return min(outcome, self._holders.take(caller.id, now=now), key=_strictness)

    def registered(self, address: str) -> None:
        """Count a new user. Raises LumarisError `rate_limited` for too many of one address."""
        if address == LOCAL:
            return
        outcome = self._registrations.take(address, now=self._clock())
        if not outcome.allowed:
            raise RateLimitedError(outcome)

    def check_login(self, name: str, address: str) -> None:
        """Raises LumarisError `rate_limited` after too many failures: of this name from this
        address, of the address, or of the name from anywhere."""
        now = self._clock()
        for buckets, key in self._login_buckets(name, address):
            outcome = buckets.peek(key, now=now)
            if not outcome.allowed:
                raise RateLimitedError(outcome)

    def login_failed(self, name: str, address: str) -> None:
        """Count a failure; one that turns out to be none is given back."""
        now = self._clock()
        for buckets, key in self._login_buckets(name, address):
            buckets.take(key, now=now)

    def login_succeeded(self, name: str, address: str) -> None:
        """Give back what was counted in advance."""
        now = self._clock()
        for buckets, key in self._login_buckets(name, address):
            buckets.give_back(key, now=now)

    def _login_buckets(self, name: str, address: str) -> list[tuple[Buckets, str]]:
        found = [(self._login_names, name)]
        # Behind one of these may be everybody: a stranger's failures must not keep others out.
        if address != UNKNOWN:
            found.append((self._pairs, f"{address} {name}"))
        if address not in (UNKNOWN, LOCAL):
            found.append((self._login_addresses, address))
        return found


class RateLimitedError(LumarisError):
    """Too many requests; carries the bucket that was empty."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(
            "rate_limited", f"Too many requests; try again in {outcome.retry_after_s} s."
        )
        self.outcome = outcome


def group_of(address: str) -> str | None:
    """What an IP address is counted as: itself, or the /64 around an IPv6 address, which one owner
    has whole. None for this machine itself, and what is no IP address counts as one name."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return UNKNOWN
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif not found.is_loopback:
            return str(ipaddress.ip_network((found, 64), strict=False))
    return None if found.is_loopback else str(found)


def _strictness(outcome: Outcome) -> tuple[bool, int]:
    return outcome.allowed, outcome.left
