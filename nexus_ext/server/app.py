"""The ASGI application: routes, guards, and what happens at the start and the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from difflib import get_close_matches
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nexus_ext.errors import NexusError
from nexus_ext.multiplexer.api import Engine
from nexus_ext.plugins import plugins
from nexus_ext.server.config import Config
from nexus_ext.server.endpoints import ENDPOINTS
from nexus_ext.server.errors import HttpError
from nexus_ext.server.guard import Guard
from nexus_ext.server.http import Counter, api_of, error_response
from nexus_ext.server.plugin_routes import plugin_routes
from nexus_ext.server.service import Service
from nexus_ext.store import Library

_log = logging.getLogger("nexus_ext.server")


def create_app(engine: Engine, library: Library, config: Config | None = None) -> Starlette:
    """Return the server as an ASGI application. It closes the engine when it ends."""
    config = config or Config()
    service = Service(engine, library, config)
    service.waiting_for = list(config.models.preload)
    counter = Counter(config.server.max_requests)
    routes = [
        Route(
            endpoint.path.replace("{model}", "{model:path}"),
            endpoint.bound(service, counter),
            methods=[endpoint.method],
        )
        for endpoint in ENDPOINTS
    ]
    added = plugin_routes(routes)
    middleware = [Middleware(Guard, config=config.server)]
    if config.server.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
        middleware.append(cors)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(preload(service))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await engine.close()
            await asyncio.to_thread(plugins().wait_for_observers)

    app = Starlette(
        routes=[*routes, *added],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_exception},
    )
    app.state.service = service
    return app


async def preload(service: Service) -> None:
    """Load what the configuration names, one after the other; readiness waits for it."""
    for name in list(service.waiting_for):
        try:
            stored = service.library.find(name)
            await service.engine.load(str(stored.name))
        except (NexusError, OSError) as error:
            _log.error("%s could not be loaded: %s", name, error)
            service.failed[name] = str(error)
        service.waiting_for.remove(name)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses in the envelope of the API whose path it is."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    texts = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    text = texts.get(status, HTTPStatus(status).phrase.lower())
    near: list[str] = []
    if status == 404:
        near = get_close_matches(request.url.path, [e.path for e in ENDPOINTS], n=1, cutoff=0.8)
    refusal = HttpError(
        status,
        text,
        hint=f"did you mean {near[0]}?" if near else "",
        code=HTTPStatus(status).name.lower(),
        headers=dict(error.headers or {}),
    )
    return error_response(api_of(request.url.path), refusal)
