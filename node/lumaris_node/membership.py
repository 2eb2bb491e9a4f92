"""The node's membership: its certificate, kept on disk, renewed in time, shown with its addresses.

A certificate is obtained before the network is joined, for nobody there talks to a peer without
one. What was learnt is cached, so that a node starts while its coordinator is away, and a restart
asks the coordinator only what may have changed: its terms and who else is there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio
from msgspec import structs

from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol import coordinator_api, key_list
from lumaris_protocol.coordinator_api import TRANSIENT, Info
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S

log = logging.getLogger(__name__)

_RENEW_SHARE = 2  # a certificate is renewed at half its life
_CHECK_S = 30.0
_RETRY_S_MIN, _RETRY_S_MAX = 1.0, 60.0
# Addresses may change often behind a NAT; buyers learn them from adverts, the coordinator's list
# only serves newcomers.
_ANNOUNCE_S = 300.0
_FILE_BYTES_MAX = 1 << 20


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator last told this node. The file is private: it holds the token."""

    url: str
    peer: str
    info: Info
    certificate: bytes
    account: str
    token: str
    issued_at: int
    expires_at: int
    addresses: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    key_list: bytes = b""

    def is_young(self, now: float) -> bool:
        """Whether the certificate need not be renewed yet."""
        return now < self.expires_at - (self.expires_at - self.issued_at) / _RENEW_SHARE

    def is_valid(self, now: float) -> bool:
        """Whether everybody would still accept the certificate."""
        return now < self.expires_at - CLOCK_SKEW_S


class Enrolment:
    """Keeps one node enrolled with one coordinator."""

    def __init__(
        self,
        link: CoordinatorLink,
        key: KeyPair,
        cache: Path,
        *,
        url: str,
        clock: Callable[[], float],
    ) -> None:
        self._link, self._key, self._cache = link, key, cache
        self._url, self._clock = url, clock
        self._standing: Standing | None = None
        self._trusted: TrustedKeys | None = None
        self._behind = False  # the coordinator could not be asked what it must be asked
        self._announced_at = -_ANNOUNCE_S

    @property
    def standing(self) -> Standing:
        """How things stand after `join`."""
        assert self._standing is not None, "join comes first"
        return self._standing

    @property
    def trusted(self) -> TrustedKeys:
        """The coordinator's keys after `join`; they follow its list."""
        assert self._trusted is not None, "join comes first"
        return self._trusted

    async def join(self) -> Standing:
        """A valid certificate: the cached one while it is young or nobody can renew it.

        Raises LumarisError; `coordinator_unreachable` only when nothing valid is cached.
        """
        cached = await trio.to_thread.run_sync(self._read, self._clock())
        try:
            info = await self._link.info()
            trusted = self._trusted = await self._learn_keys(info, self._trust(cached, info))
            if cached is not None and trusted.signed(cached.certificate):
                cached = self._standing = structs.replace(cached, info=info, key_list=trusted.data)
            else:
                cached = None
            if cached is None or not cached.is_young(self._clock()):
                await self._register(info, cached.addresses if cached else ())
            await self._learn_bootstrap()
        except LumarisError as error:
            known = self._standing or cached
            if known is None or error.code not in TRANSIENT:
                raise
            log.warning("going on with the cached membership code=%s", error.code)
            self._behind, self._standing = True, known
            self._trusted = self._trusted or self._trust(known, known.info)
        return self.standing

    async def announce(self, addresses: tuple[str, ...]) -> None:
        """Tell the coordinator where we are, unless it knows."""
        if addresses == self.standing.addresses:
            return
        try:
            await self._register(self.standing.info, addresses)
        except LumarisError as error:
            log.warning("addresses not announced code=%s", error.code)
            self._behind = True

    async def keep(
        self,
        addresses: Callable[[], Awaitable[tuple[str, ...]]],
        changed: Callable[[Standing], Awaitable[None]],
    ) -> None:
        """Renew at half life, when the issuer's key counts no more and when the addresses changed;
        keep trying while nobody answers."""
        delay = _RETRY_S_MIN if self._behind else _CHECK_S
        while True:
            await trio.sleep(delay)
            try:
                found = await addresses()
                if self._is_due(found):
                    await self._register(await self._renewed(), found)
                    if self._behind:
                        await self._learn_bootstrap()
                    self._behind = False
                    await changed(self.standing)
                delay = _CHECK_S
            except LumarisError as error:
                log.warning("certificate not renewed code=%s", error.code)
                self._behind = True
                delay = min(max(delay, _RETRY_S_MIN) * 2, _RETRY_S_MAX)

    def _is_due(self, addresses: tuple[str, ...]) -> bool:
        # Looked at now and then, not at once: when a key is revoked all nodes hear of it together,
        # and must not all register in the same second.
        vouched = self.trusted.signed(self.standing.certificate)
        if not vouched:
            log.warning("the key that signed our certificate counts no more; registering anew")
        if self._behind or not vouched or not self.standing.is_young(self._clock()):
            return True
        quiet_s = trio.current_time() - self._announced_at
        return addresses != self.standing.addresses and quiet_s >= _ANNOUNCE_S

    def _trust(self, cached: Standing | None, info: Info) -> TrustedKeys:
        """What is known of the coordinator's keys before it is asked: the cached list, since the
        same coordinator may sign with another key by now."""
        if cached is None or cached.info.network != info.network:
            return TrustedKeys(info.coordinator, network=info.network, clock=self._clock)
        return TrustedKeys(
            cached.info.coordinator,
            network=info.network,
            clock=self._clock,
            data=cached.key_list,
        )

    async def _learn_keys(self, info: Info, trusted: TrustedKeys) -> TrustedKeys:
        """The coordinator's list taken in. Raises LumarisError."""
        data = await self._fetch_list()
        if key_list.is_another(data, trusted, coordinator=info.coordinator, network=info.network):
            # Set up anew at the same address: its root is pinned as at a first meeting.
            trusted = TrustedKeys(info.coordinator, network=info.network, clock=self._clock)
        trusted.meet(info.coordinator, data)
        return trusted

    async def _fetch_list(self) -> bytes:
        try:
            return await self._link.call(coordinator_api.key_list())
        except LumarisError as error:
            if error.code == "not_found":
                return b""
            raise

    async def _renewed(self) -> Info:
        """The terms as they are now, of the same coordinator. Raises LumarisError."""
        info = await self._link.info()
        if info.network != self.standing.info.network:
            raise LumarisError("wrong_domain", "The coordinator is of another network now.")
        self.trusted.meet(info.coordinator, await self._fetch_list())
        return info

    async def _register(self, info: Info, addresses: tuple[str, ...]) -> None:
        said = await self._link.register(self._key, info, addresses=addresses, clock=self._clock)
        bootstrap = self._standing.bootstrap if self._standing is not None else ()
        self._announced_at = trio.current_time()
        await self._save(
            Standing(
                url=self._url,
                peer=self._key.peer_id,
                info=info,
                certificate=said.certificate,
                account=said.account,
                token=said.token,
                issued_at=int(self._clock()),
                expires_at=said.expires_at,
                addresses=addresses,
                bootstrap=bootstrap,
                key_list=self.trusted.data,
            )
        )

    async def _learn_bootstrap(self) -> None:
        found = tuple((await self._link.call(coordinator_api.bootstrap())).addresses)
        await self._save(structs.replace(self.standing, bootstrap=found))

    async def _save(self, standing: Standing) -> None:
        self._standing = standing
        data = msgspec.json.encode(standing)
        try:
            await trio.to_thread.run_sync(write_private_file, self._cache, data)
        except OSError as error:  # it is needed only at the next start
            log.warning("membership not saved error=%s", error.strerror)

    def _read(self, now: float) -> Standing | None:
        try:
            with self._cache.open("rb") as file:
                standing = msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=Standing)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        ours = (standing.url, standing.peer) == (self._url, self._key.peer_id)
        return standing if ours and standing.is_valid(now) else None
