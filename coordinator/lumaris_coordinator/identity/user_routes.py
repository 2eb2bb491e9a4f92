"""/v1/users, /v1/sessions, /v1/api-keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import API_KEY_LIFETIME_S, API_KEY_RATE_MAX, CREDENTIAL_RATE
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    caller_of,
    coordinator_of,
    document_body,
    json_body,
    json_response,
    read_json,
)
from lumaris_coordinator.idempotency import idempotent
from lumaris_coordinator.identity.api_keys import Wanted
from lumaris_coordinator.identity.people import UserName
from lumaris_coordinator.limits.limiter import RateLimitedError
from lumaris_coordinator.limits.middleware import address_of, note
from lumaris_protocol.messages.base import Name

router = APIRouter(tags=["users"])

Password = Annotated[str, Meta(min_length=10, max_length=256)]
# What is checked may be anything short: the rule for new passwords tells nothing about old ones.
Guess = Annotated[str, Meta(max_length=256)]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    """A user to be."""

    name: UserName
    password: Password


class Login(msgspec.Struct, forbid_unknown_fields=True):
    """A name with its password."""

    name: Annotated[str, Meta(max_length=64)]
    password: Guess


class PasswordChange(msgspec.Struct, forbid_unknown_fields=True):
    """The password now, and the one from now on."""

    old: Guess
    new: Password


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """An API key to be."""

    name: Name
    scopes: Annotated[
        tuple[Literal["read", "write", "operator"], ...], Meta(min_length=1, max_length=3)
    ] = ("read",)
    lifetime_s: Annotated[int, Meta(ge=60)] = API_KEY_LIFETIME_S
    rate_per_s: Annotated[int, Meta(ge=1, le=API_KEY_RATE_MAX)] = CREDENTIAL_RATE


@router.post("/v1/users", status_code=201, openapi_extra=json_body(NewUser))
async def register(request: Request) -> Response:
    """{user, name, created_at}: a new user with an account of its own. A name is free or taken, so
    this needs no Idempotency-Key: a repetition answers `name_taken`."""
    wanted = await read_json(request, NewUser)
    users = coordinator_of(request).users
    with _told(request):
        made = await users.register(wanted.name, wanted.password, address=address_of(request))
    return json_response(made, 201)


@router.post("/v1/sessions", openapi_extra=json_body(Login))
async def login(request: Request) -> Response:
    """{user, token, expires_at} for a name and its password; each login is another token."""
    found = await read_json(request, Login)
    users = coordinator_of(request).users
    with _told(request):
        answer = await users.login(found.name, found.password, address=address_of(request))
    return json_response(answer)


@router.delete("/v1/sessions/me", status_code=204, openapi_extra=BEARER)
async def logout(request: Request) -> Response:
    """End the token that the request carries."""
    caller = await caller_of(request)
    await coordinator_of(request).users.logout(caller, _secret_of(request))
    return Response(status_code=204)


@router.get("/v1/users/me", openapi_extra=BEARER)
async def show(request: Request) -> Response:
    """{user, name, operator, created_at, peers}."""
    return json_response(await coordinator_of(request).users.show(await caller_of(request)))


@router.post(
    "/v1/users/me/password", status_code=204, openapi_extra={**BEARER, **json_body(PasswordChange)}
)
async def change_password(request: Request) -> Response:
    """Replace the password; every other token of the user ends, API keys stay."""
    caller = await caller_of(request, "write")
    found = await read_json(request, PasswordChange)
    users = coordinator_of(request).users
    with _told(request):
        await users.change_password(
            caller,
            found.old,
            found.new,
            token=_secret_of(request),
            address=address_of(request),
        )
    return Response(status_code=204)


@router.post("/v1/users/me/peers", openapi_extra={**BEARER, **document_body("peer_link")})
async def link(request: Request) -> Response:
    """{peers}: the peer that signed the link belongs to the user from now on."""
    caller = await caller_of(request, "write")
    return json_response(await coordinator_of(request).users.link(caller, await read_body(request)))


@router.delete("/v1/users/me/peers/{peer}", status_code=204, openapi_extra=BEARER)
async def unlink(request: Request, peer: str) -> Response:
    """Take a peer from its owner: asked by the owner, or by the peer itself."""
    caller = await caller_of(request, "write")
    await coordinator_of(request).users.unlink(caller, peer)
    return Response(status_code=204)


@router.post("/v1/api-keys", status_code=201, openapi_extra={**BEARER, **json_body(NewKey)})
async def create_key(request: Request) -> Response:
    """A new key; `key` is its text, shown this once."""
    caller = await caller_of(request, "write")
    found = await read_json(request, NewKey)
    wanted = Wanted(found.name, found.scopes, found.lifetime_s, found.rate_per_s)
    keys = coordinator_of(request).api_keys
    return await idempotent(
        request, caller, lambda connection: keys.create(connection, caller, wanted), status=201
    )


@router.get("/v1/api-keys", openapi_extra=BEARER)
async def list_keys(request: Request) -> Response:
    """{keys}: the caller's, without their secrets."""
    return json_response(await coordinator_of(request).api_keys.list(await caller_of(request)))


@router.post("/v1/api-keys/{key}/rotate", status_code=201, openapi_extra=BEARER)
async def rotate_key(request: Request, key: str) -> Response:
    """A new key in place of one, which stays valid for a day."""
    caller = await caller_of(request, "write")
    keys = coordinator_of(request).api_keys
    return await idempotent(
        request, caller, lambda connection: keys.rotate(connection, caller, key), status=201
    )


@router.delete("/v1/api-keys/{key}", status_code=204, openapi_extra=BEARER)
async def delete_key(request: Request, key: str) -> Response:
    """End a key at once."""
    caller = await caller_of(request, "write")
    await coordinator_of(request).api_keys.delete(caller, key)
    return Response(status_code=204)


def _secret_of(request: Request) -> str:
    return request.headers.get("authorization", "").partition(" ")[2]


@contextmanager
def _told(request: Request) -> Iterator[None]:
    try:
        yield
    except RateLimitedError as error:
        note(request, error)
        raise
