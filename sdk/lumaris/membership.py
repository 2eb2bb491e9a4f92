"""Who the buyer is on the network: its key on disk, the coordinator's terms, its certificate.

What was learnt is cached, so that a coordinator that is down stops nothing but new grants.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec
import trio

from lumaris.coordinator import CoordinatorLink
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Account, Info
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.budget import CreditRequest, Registration

log = logging.getLogger(__name__)

_RENEW_BEFORE_S = 3600


class Standing(msgspec.Struct, frozen=True):
    """What is cached between runs. The file is private: it holds the session token."""

    url: str
    info: Info
    certificate: bytes
    account: str
    token: str
    expires_at: int
    bootstrap: tuple[str, ...]


async def join(link: CoordinatorLink, key: KeyPair, cache: Path, *, url: str) -> Standing:
    """Our standing with the coordinator at `url`: the cached one while it is good, else a new one.

    Raises LumarisError; `coordinator_unreachable` only when there is nothing cached to go on with.
    """
    cached = await _read(cache, url)
    if cached is not None and cached.expires_at > time.time() + _RENEW_BEFORE_S:
        return cached
    try:
        standing = await _register(link, key, url)
    except LumarisError as error:
        if error.code == "coordinator_unreachable" and cached is not None:
            log.warning("going on with the cached membership url=%s", url)
            return cached
        raise
    await trio.to_thread.run_sync(_write, cache, standing)
    return standing


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
    await trio.to_thread.run_sync(_write, cache, standing)
    return standing


async def deposit_test_credit(
    link: CoordinatorLink, key: KeyPair, standing: Standing, *, amount_nanos: int, nonce: str
) -> Account:
    """Ask for test credit; a repeated `nonce` credits once. Raises LumarisError `credit_limit`."""
    request = CreditRequest(
        peer=key.peer_id,
        coordinator=standing.info.coordinator,
        amount_nanos=amount_nanos,
        nonce=nonce,
        issued_at=int(time.time()),
    )
    signed = codec.sign(request, key, standing.info.network)
    return await link.call(coordinator_api.credit(signed.data))


async def _register(link: CoordinatorLink, key: KeyPair, url: str) -> Standing:
    info = await link.call(coordinator_api.info())
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
    )


async def _read(cache: Path, url: str) -> Standing | None:
    try:
        standing = msgspec.json.decode(await trio.Path(cache).read_bytes(), type=Standing)
    except (OSError, msgspec.MsgspecError):
        return None
    return standing if standing.url == url else None


def _write(cache: Path, standing: Standing) -> None:
    part = cache.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_bytes(msgspec.json.encode(standing))
    part.replace(cache)
