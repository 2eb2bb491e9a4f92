"""The short way to the routes that carry the load: signed documents posted to a fixed path.

The framework's way to a handler (match every route, solve its dependencies, keep stacks of what to
close) costs more than the signatures that such a request is about. The routes stay the framework's,
and so does their description; only requests that name one exactly are handed to it here.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_protocol.errors import LumarisError


class Direct:
    """The innermost ASGI layer: everything around it has happened already."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, APIRoute) and _is_plain(route)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http" or scope.get("root_path"):
            await self._app(scope, receive, send)
            return
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # what the request is counted and logged as
        request = Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except LumarisError as error:
            response = await problems.on_error(request, error)
        await response(scope, receive, send)


def _is_plain(route: APIRoute) -> bool:
    """Whether its handler takes the request and answers with a response: nothing is left to do."""
    return not route.param_convertors and list(signature(route.endpoint).parameters) == ["request"]
