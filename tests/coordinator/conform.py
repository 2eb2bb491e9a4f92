"""Every answer that a test gets through the market's client is held to the OpenAPI document."""

from __future__ import annotations

import re
from typing import Final

import httpx
import msgspec

from lumaris_coordinator.answers import Problem
from lumaris_coordinator.openapi import ANSWERS
from lumaris_coordinator.problems import MEDIA_TYPE

_ROUTES: Final = [
    (
        name,
        re.compile(
            re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(name)).replace("tile/[^/]+", "tile/.+")
        ),
    )
    for name in sorted(ANSWERS, key=lambda name: ("{" in name, name))
]


async def hold_to_description(response: httpx.Response) -> None:
    """A hook of the client. Raises AssertionError or msgspec.ValidationError."""
    body = await response.aread()
    media = response.headers.get("content-type", "")
    asked = f"{response.request.method} {response.request.url.path}"
    if response.status_code >= 400:
        assert media == MEDIA_TYPE, (asked, media)
        msgspec.json.decode(body, type=Problem)
        return
    name = next((name for name, pattern in _ROUTES if pattern.fullmatch(asked)), None)
    if name is None:  # the document itself
        return
    told = next((one for one in ANSWERS[name] if one.status == response.status_code), None)
    assert told is not None, f"{name} answered {response.status_code}"
    assert media == (told.media or ""), (name, media)
    if told.shape is not None:
        msgspec.json.decode(body, type=told.shape)
    elif told.media is None:
        assert not body, name
