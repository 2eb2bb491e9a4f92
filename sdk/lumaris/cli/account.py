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
from lumaris.coordinator import CoordinatorLink, link_in, open_link
from lumaris.disputes import NODE_KEY
from lumaris.membership import Standing
from lumaris.profile import Profile
from lumaris_overlay.private_files import load_or_create_key
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Account, Payout, User
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.identity import PeerLink
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


def user_of(profile: Profile, api_key: str) -> User:
    """The user of an API key. Raises LumarisError `unauthorized` among others."""
    return trio.run(_as_user, profile, api_key, _nothing)


def link_to_user(profile: Profile, api_key: str) -> User:
    """Make the profile's peer, or the node's whose folder it is, the user's.

    Raises LumarisError: `not_certified` for a peer that is not registered yet, `already_linked`,
    `limit_reached`.
    """

    async def link(line: CoordinatorLink, key: KeyPair, user: User) -> None:
        info = await line.call(coordinator_api.info())
        message = PeerLink(
            peer=key.peer_id,
            coordinator=info.coordinator,
            user=user.user,
            issued_at=int(time.time()),
        )
        signed = codec.sign(message, key, info.network)
        await line.call(coordinator_api.link_peer(signed.data, api_key))

    return trio.run(_as_user, profile, api_key, link)


def unlink_from_user(profile: Profile, api_key: str) -> User:
    """Take the peer from its user. Raises LumarisError `not_found`."""

    async def unlink(line: CoordinatorLink, key: KeyPair, _user: User) -> None:
        await line.call(coordinator_api.unlink_peer(key.peer_id, api_key))

    return trio.run(_as_user, profile, api_key, unlink)


async def _nothing(_line: CoordinatorLink, _key: KeyPair, _user: User) -> None:
    """Only look."""


async def _as_user(
    profile: Profile,
    api_key: str,
    work: Callable[[CoordinatorLink, KeyPair, User], Awaitable[None]],
) -> User:
    """Do it, and see what the user is then."""
    node = profile.state / NODE_KEY
    key = load_or_create_key(node if node.exists() else profile.key_file)
    line = link_in(profile.state, profile.coordinator, key, ca_file=profile.ca_file)
    try:
        user = await line.call(coordinator_api.user(api_key))
        await work(line, key, user)
        return await line.call(coordinator_api.user(api_key))
    finally:
        await line.aclose()


async def _with_coordinator(
    profile: Profile, ask: Callable[[CoordinatorLink, KeyPair, Standing], Awaitable[T]]
) -> T:
    key = load_or_create_key(profile.key_file)
    cache = profile.state / "membership.json"
    link = open_link(profile)
    try:
        standing = await membership.join(link, key, cache, url=profile.coordinator)
        try:
            return await ask(link, key, standing)
        except LumarisError as error:
            # A coordinator that was set up anew at the old address does not know our token; one
            # that took the key back which we name refuses it.
            if error.code not in ("unauthorized", "wrong_signer", "wrong_domain", "revoked"):
                raise
        standing = await membership.rejoin(link, key, cache, standing)
        return await ask(link, key, standing)
    finally:
        await link.aclose()
