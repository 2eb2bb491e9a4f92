"""The buyer's account at its coordinator, without joining the network."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from lumaris import membership
from lumaris import profile as profiles
from lumaris.cli.options import Settings
from lumaris.coordinator import CoordinatorLink
from lumaris.membership import Standing
from lumaris.profile import Profile
from lumaris_overlay.private_files import load_or_create_key
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Account, Payout
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.money import PayoutRequest

T = TypeVar("T")


def profile_of(settings: Settings) -> Profile:
    """The buyer's profile; its folder is made. Raises LumarisError `not_writable`."""
    return profiles.load(state=settings.state, coordinator=settings.coordinator)


def balances(profile: Profile) -> Account:
    """The balances. Raises LumarisError."""

    async def ask(link: CoordinatorLink, _key: KeyPair, standing: Standing) -> Account:
        return await link.call(coordinator_api.account(standing.token))

    return trio.run(_with_coordinator, profile, ask)


def deposit_test_credit(profile: Profile, amount_nanos: int) -> Account:
    """Get test credit. Raises LumarisError `credit_limit` among others."""
    nonce = os.urandom(16).hex()  # one for both attempts: a repeated request credits once

    async def ask(link: CoordinatorLink, key: KeyPair, standing: Standing) -> Account:
        return await membership.deposit_test_credit(
            link, key, standing, amount_nanos=amount_nanos, nonce=nonce
        )

    return trio.run(_with_coordinator, profile, ask)


def request_payout(profile: Profile, amount_nanos: int, *, adapter: str) -> Payout:
    """Take money out of the market. Raises LumarisError `no_funds` among others."""
    nonce = os.urandom(16).hex()  # one for both attempts: a repeated request pays once

    async def ask(link: CoordinatorLink, key: KeyPair, standing: Standing) -> Payout:
        request = PayoutRequest(
            peer=key.peer_id,
            coordinator=standing.info.coordinator,
            adapter=adapter,
            amount_nanos=amount_nanos,
            currency=standing.info.currency,
            nonce=nonce,
            issued_at=int(time.time()),
        )
        signed = codec.sign(request, key, standing.info.network)
        return await link.call(coordinator_api.payout(signed.data))

    return trio.run(_with_coordinator, profile, ask)


def fetch_receipt(profile: Profile, receipt: str) -> bytes:
    """The receipt file as the coordinator makes it now. Raises LumarisError `not_found` among
    others."""

    async def ask(link: CoordinatorLink, _key: KeyPair, standing: Standing) -> bytes:
        return await link.call(coordinator_api.receipt(receipt, standing.token))

    return trio.run(_with_coordinator, profile, ask)


async def _with_coordinator(
    profile: Profile, ask: Callable[[CoordinatorLink, KeyPair, Standing], Awaitable[T]]
) -> T:
    key = load_or_create_key(profile.key_file)
    cache = profile.state / "membership.json"
    link = CoordinatorLink(profile.coordinator)
    try:
        standing = await membership.join(link, key, cache, url=profile.coordinator)
        try:
            return await ask(link, key, standing)
        except LumarisError as error:
            # A coordinator that was set up anew at the old address does not know our token.
            if error.code not in ("unauthorized", "wrong_signer", "wrong_domain"):
                raise
        cache.unlink(missing_ok=True)
        standing = await membership.join(link, key, cache, url=profile.coordinator)
        return await ask(link, key, standing)
    finally:
        await link.aclose()
