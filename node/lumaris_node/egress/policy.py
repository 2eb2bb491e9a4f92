"""Which connections of a job are allowed, by name first and by address after.

A rule is `host:port` or `*.domain:port`; an owner's pattern may also be `*` for any host or any
port. A name that is allowed is resolved here, once, and only a public address of it is connected
to: what is private, link-local, a cloud's metadata service or this machine itself is never reached,
whatever a rule says and whatever a name resolves to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from lumaris_overlay.networks import is_public
from lumaris_overlay.resolver import Resolver
from lumaris_protocol.errors import LumarisError

_RESOLVE_S = 10
# A name with more is not a better one; each is tried in turn.
_ADDRESSES_MAX = 4
_OWNER_PATTERN = re.compile(r"(\*|(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?):(\*|[0-9]{1,5})")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises LumarisError `config_invalid` for an owner's pattern that is none."""
    for pattern in patterns:
        found = _OWNER_PATTERN.fullmatch(pattern)
        if found is None or (found[4] != "*" and not 0 < int(found[4]) < 65_536):
            raise LumarisError(
                "config_invalid",
                f"accept.egress {pattern!r} is not HOST:PORT, *.DOMAIN:PORT or *:PORT.",
            )


def covers(patterns: Iterable[str], rule: str) -> bool:
    """Whether an owner's patterns allow everything that a rule of an agreement does."""
    host, _, port = rule.rpartition(":")
    return any(
        wide_port in ("*", port) and (wide == "*" or _matches(wide, host))
        for wide, _, wide_port in (pattern.rpartition(":") for pattern in patterns)
    )


class EgressPolicy:
    """The rules of one agreement, on this machine. `own` gives this machine's addresses."""

    def __init__(
        self,
        rules: Iterable[str],
        *,
        own: Callable[[], Iterable[str]],
        resolve: Resolve | None = None,
    ) -> None:
        self._rules, self._own, self._resolve = tuple(rules), own, resolve or Resolver()

    def allows(self, host: str, port: int) -> bool:
        """Whether a rule names this host and port."""
        host = host.lower().rstrip(".")
        return any(
            wanted == str(port) and _matches(name, host)
            for name, _, wanted in (rule.rpartition(":") for rule in self._rules)
        )

    async def addresses(self, host: str, port: int) -> tuple[str, ...]:
        """The public IPs to connect to. Raises LumarisError `egress_refused`, `unreachable`."""
        if not self.allows(host, port):
            raise LumarisError("egress_refused", f"The agreement does not name {host}:{port}.")
        try:
            with trio.fail_after(_RESOLVE_S):
                found = await self._resolve(host, port)
        except (OSError, UnicodeError, trio.TooSlowError) as error:
            raise LumarisError("unreachable", f"{host} has no address here.") from error
        own = {_plain(ip) for ip in self._own()}
        public = [ip for ip in found if is_public(ip) and _plain(ip) not in own]
        if not public:
            raise LumarisError(
                "egress_refused", f"{host} is private, link-local or this machine itself."
            )
        return tuple(public[:_ADDRESSES_MAX])


def own_addresses() -> set[str]:
    """The IPs of all interfaces of this machine."""
    import psutil

    return {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*."):
        return pattern == host or host.removeprefix("*.").endswith(pattern[1:])
    return host == pattern


def _plain(ip: str) -> str:
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)
