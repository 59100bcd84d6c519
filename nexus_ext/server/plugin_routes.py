"""Routes of plugins: behind the same guards as ours, and never in the place of one of ours.

A handler that raises answers its own request with status 500 in the envelope of the path's API.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from nexus_ext.errors import NexusError
from nexus_ext.plugin_registry import describe, show
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.policies import ServerInfo
from nexus_ext.server.http import api_of, error_response

HOOK: Final = "nexus_server_routes"

_log = logging.getLogger("nexus_ext.server")


class PluginRoute(BaseRoute):
    """A route of a plugin that matches nothing that a route of ours matches."""

    def __init__(self, plugin: str, route: Route, ours: Sequence[Route]) -> None:
        self.plugin = plugin
        self.path = route.path
        self.methods = route.methods
        self._route = route
        self._ours = ours

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if any(route.matches(scope)[0] is not Match.NONE for route in self._ours):
            return Match.NONE, {}
        try:
            return self._route.matches(scope)
        except Exception as error:  # a convertor of the plugin's, say
            plugins().disable(self.plugin, HOOK, f"raised {describe(error)}", error)
            return Match.NONE, {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        return self._route.url_path_for(name, **path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._route.handle(scope, receive, watched)
        except Exception as error:
            what = f"raised {describe(error)} for {scope['method']} {scope['path']}"
            plugins().note(self.plugin, HOOK, what)
            _log.debug("plugin %r", self.plugin, exc_info=error)
            if started:
                return  # half an answer is out: the connection ends here
            failure = NexusError(f"the plugin {self.plugin!r} failed at this: {describe(error)}")
            await error_response(api_of(scope["path"]), failure)(scope, receive, send)


def plugin_routes(ours: Sequence[Route]) -> list[PluginRoute]:
    """Return the routes that plugins add to ours. Of two for one path the first plugin's stays."""
    found: list[PluginRoute] = []
    taken: dict[tuple[str, str], str] = {
        (route.path, method): "nexus_ext" for route in ours for method in route.methods or ()
    }
    ours_by_path = {route.path for route in ours}
    info = ServerInfo(paths=tuple(sorted(ours_by_path)))
    for plugin, routes in plugins().collect(HOOK, _accept, info=info):
        for route in routes:
            methods = sorted(route.methods or ())
            owner = next((taken[route.path, m] for m in methods if (route.path, m) in taken), None)
            if owner is None and route.path in ours_by_path:
                owner = "nexus_ext"  # our path with another method is ours as well
            if owner is not None:
                what = f"has the route {route.path!r}, which {owner!r} has: it is left out"
                plugins().note(plugin, HOOK, what)
                continue
            taken.update(((route.path, method), plugin) for method in methods)
            found.append(PluginRoute(plugin, route, ours))
    return found


def _accept(answer: object) -> list[Route]:
    """Return routes of HTTP methods; a websocket or a mount would pass by the API key."""
    if not isinstance(answer, (list, tuple)):
        raise Rubbish(f"returned {show(answer)}, which is no list of routes")
    for route in answer:
        if not isinstance(route, Route) or not route.methods:
            raise Rubbish(f"returned {show(route)}, which is no starlette.routing.Route")
    return list(answer)
