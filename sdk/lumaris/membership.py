"""Who the buyer is on the network: its key on disk, the coordinator's terms, its certificate.

What was learnt is cached, so that a coordinator that is down stops nothing but new grants.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from lumaris.coordinator import CoordinatorLink
from lumaris.profile import Profile
from lumaris_overlay.notice_upkeep import pass_on_keys
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import write_private_file
from lumaris_overlay.supervisor import OverlayConfig
from lumaris_protocol import codec, coordinator_api, key_list
from lumaris_protocol.coordinator_api import TRANSIENT, Account, Info
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.budget import CreditRequest, Registration

log = logging.getLogger(__name__)

CACHE_NAME = "membership.json"
_RENEW_BEFORE_S = 3600
# Looked at often, since a machine that slept wakes up hours later.
_RENEW_CHECK_S = 30.0
_FILE_BYTES_MAX = 1 << 20


class Standing(msgspec.Struct, frozen=True):
    """What is cached between runs. The file is private: it holds the session token."""

    url: str
    info: Info
    certificate: bytes
    account: str
    token: str
    expires_at: int
    bootstrap: tuple[str, ...]
    peer: str = ""
    key_list: bytes = b""

    def trusted(self) -> TrustedKeys:
        """The coordinator's keys, as its list said when it was asked last."""
        info = self.info
        return TrustedKeys(
            info.coordinator, network=info.network, clock=time.time, data=self.key_list
        )

    def is_valid(self, now: float, *, for_s: float = CLOCK_SKEW_S) -> bool:
        """Whether the certificate is accepted for some time to come, by the keys known here."""
        return now + for_s < self.expires_at and self.trusted().signed(self.certificate)


async def enter(link: CoordinatorLink, key: KeyPair, profile: Profile) -> Standing:
    """Our standing with the profile's coordinator by its keys of now, and where the network is.

    Raises LumarisError as `join` does.
    """
    cache = profile.state / CACHE_NAME
    standing = await join(link, key, cache, url=profile.coordinator)
    trusted = standing.trusted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(learn_keys, link, trusted)
        standing = await refresh_bootstrap(link, cache, standing)
    if trusted.data != standing.key_list:
        standing = msgspec.structs.replace(standing, key_list=trusted.data)
        await _keep(cache, standing)
    if not trusted.signed(standing.certificate):
        standing = await rejoin(link, key, cache, standing)
    return standing


async def present(
    overlay: Overlay, link: CoordinatorLink, key: KeyPair, profile: Profile, standing: Standing
) -> Standing:
    """Show our certificate on the overlay; one that counts there no more is replaced. The standing
    after it. Raises LumarisError."""
    try:
        await show(overlay, standing)
    except LumarisError as error:
        if error.code != "not_certified":
            raise
        standing = await rejoin(link, key, profile.state / CACHE_NAME, standing)
        await show(overlay, standing)
    return standing


async def show(overlay: Overlay, standing: Standing) -> None:
    """Present a certificate to an overlay that may not know the key it is signed with.

    Raises LumarisError `not_certified`.
    """
    await pass_on_keys(overlay, standing.key_list)
    await overlay.present(standing.certificate)


async def learn_keys(link: CoordinatorLink, trusted: TrustedKeys) -> None:
    """Ask for the coordinator's key list. One that cannot be had or does not follow from what is
    known changes nothing."""
    try:
        trusted.learn(await link.call(coordinator_api.key_list()))
    except LumarisError as error:
        log.info("key list not known code=%s", error.code)


async def join(link: CoordinatorLink, key: KeyPair, cache: Path, *, url: str) -> Standing:
    """Our standing with the coordinator at `url`: the cached one while it is good, else a new one.

    What the coordinator says of its keys must follow from what is cached.

    Raises LumarisError; `coordinator_unreachable` only when nothing valid is cached.
    """
    cached = await trio.to_thread.run_sync(_read, cache, url, key.peer_id)
    if cached is not None and cached.is_valid(time.time(), for_s=_RENEW_BEFORE_S):
        return cached
    try:
        standing = await _register(link, key, url, cached)
    except LumarisError as error:
        usable = cached is not None and cached.is_valid(time.time())
        if cached is not None and usable and error.code in TRANSIENT:
            log.warning("going on with the cached membership url=%s", url)
            return cached
        raise
    await _keep(cache, standing)
    return standing


async def renew(
    link: CoordinatorLink,
    key: KeyPair,
    cache: Path,
    held: Callable[[], Standing],
    trusted: TrustedKeys,
) -> Standing:
    """Wait until the certificate held is near its end or its issuer's key is not among those
    `trusted`, and get the next one, however long that takes."""
    while True:
        await trio.sleep(_RENEW_CHECK_S)
        standing = held()
        vouched = trusted.signed(standing.certificate)
        if vouched and standing.is_valid(time.time(), for_s=_RENEW_BEFORE_S):
            continue
        if not vouched:
            log.warning("the key that signed our certificate counts no more; registering anew")
        try:
            return await rejoin(link, key, cache, standing)
        except LumarisError as error:
            log.warning("certificate not renewed code=%s", error.code)


async def rejoin(link: CoordinatorLink, key: KeyPair, cache: Path, standing: Standing) -> Standing:
    """Register anew, whatever is held. Raises LumarisError."""
    found = await _register(link, key, standing.url, standing)
    found = msgspec.structs.replace(found, bootstrap=standing.bootstrap)
    await _keep(cache, found)
    return found


async def refresh_bootstrap(link: CoordinatorLink, cache: Path, standing: Standing) -> Standing:
    """Where the network is now: sellers come back at other addresses. The cached list when the
    coordinator is away."""
    try:
        found = await link.call(coordinator_api.bootstrap())
    except LumarisError as error:
        log.warning("going on with the cached addresses code=%s", error.code)
        return standing
    if tuple(found.addresses) == standing.bootstrap:
        return standing
    standing = msgspec.structs.replace(standing, bootstrap=tuple(found.addresses))
    await _keep(cache, standing)
    return standing


def overlay_config(profile: Profile, standing: Standing) -> OverlayConfig:
    """The buyer's overlay process: all programs of one profile ask for the same one."""
    trusted = standing.trusted()
    return OverlayConfig(
        key_file=profile.key_file,
        network=standing.info.network,
        coordinator_keys=frozenset(trusted),
        roots=trusted.roots,
        state_dir=profile.overlay,
        listen=profile.listen,
        bootstrap=(*profile.bootstrap, *standing.bootstrap),
        linger_s=profile.overlay_linger_s,
    )


async def deposit_test_credit(
    link: CoordinatorLink, key: KeyPair, standing: Standing, *, amount_nanos: int, nonce: str
) -> Account:
    """Ask for test credit; a repeated `nonce` credits once. The account after it.

    Raises LumarisError `credit_limit`.
    """
    request = CreditRequest(
        peer=key.peer_id,
        coordinator=standing.info.coordinator,
        amount_nanos=amount_nanos,
        nonce=nonce,
        issued_at=int(time.time()),
    )
    signed = codec.sign(request, key, standing.info.network)
    await link.call(coordinator_api.credit(signed.data))
    return await link.call(coordinator_api.account(standing.token))


async def _register(
    link: CoordinatorLink, key: KeyPair, url: str, known: Standing | None
) -> Standing:
    info = await link.call(coordinator_api.info())
    trusted = await _learn_keys(link, info, known)
    challenge = await link.call(coordinator_api.challenge(key.peer_id))
    registration = Registration(
        peer=key.peer_id,
        coordinator=info.coordinator,
        challenge=challenge.challenge,
        roles=("buyer",),
        issued_at=int(time.time()),
    )
    signed = codec.sign(registration, key, info.network)
    membership = await link.call(coordinator_api.register(signed.data))
    return Standing(
        url=url,
        info=info,
        certificate=membership.certificate,
        account=membership.account,
        token=membership.token,
        expires_at=membership.expires_at,
        bootstrap=(),
        peer=key.peer_id,
        key_list=trusted.data,
    )


async def _learn_keys(link: CoordinatorLink, info: Info, known: Standing | None) -> TrustedKeys:
    """The coordinator's keys by its list, which must follow from the one known; a coordinator set
    up anew at the same address is met for the first time. Raises LumarisError."""
    try:
        data = await link.call(coordinator_api.key_list())
    except LumarisError as error:
        if error.code != "not_found":
            raise
        data = b""
    if known is not None and known.info.network == info.network:
        trusted = known.trusted()
        if not key_list.is_another(
            data, trusted, coordinator=info.coordinator, network=info.network
        ):
            trusted.meet(info.coordinator, data)
            return trusted
    trusted = TrustedKeys(info.coordinator, network=info.network, clock=time.time)
    trusted.meet(info.coordinator, data)
    return trusted


def _read(cache: Path, url: str, peer: str) -> Standing | None:
    try:
        with cache.open("rb") as file:
            standing = msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=Standing)
        standing.trusted()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, LumarisError):
        return None
    return standing if (standing.url, standing.peer) == (url, peer) else None


async def _keep(cache: Path, standing: Standing) -> None:
    """Remember it for the next start; a full disk only means that it is asked for again."""
    try:
        await trio.to_thread.run_sync(write_private_file, cache, msgspec.json.encode(standing))
    except OSError as error:
        log.warning("membership not cached error=%s", error)
