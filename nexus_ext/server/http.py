"""Endpoints: one table drives the routes and the OpenAPI description.

An endpoint takes the service and a checked body and returns a response. Around it: the body is
read within limits, errors become the envelope of the endpoint's API, a client that goes away ends
the work, and one request that crashes is one answer with status 500.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from nexus_ext.errors import NexusError
from nexus_ext.server import errors
from nexus_ext.server.errors import HttpError
from nexus_ext.server.service import Service

_log = logging.getLogger("nexus_ext.server")

Api = Literal["openai", "ollama", "llama.cpp"]
ENVELOPES: Mapping[Api, Callable[[NexusError], dict[str, Any]]] = {
    "openai": errors.openai_error,
    "ollama": errors.ollama_error,
    "llama.cpp": errors.llama_cpp_error,
}
_TYPES = {"str", "int", "float", "bool", "constrained-str", "constrained-int", "none"}
CLIENT_GONE = 499  # as other servers log it; nobody is there to see it


class Body(BaseModel):
    """A body of a request: types as JSON has them, unknown keys left alone."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _whole(value: object) -> object:
    """JSON does not tell 8.0 from 8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Reply(BaseModel):
    """A body of a response, for the description and for tests."""

    model_config = ConfigDict(extra="forbid")


Handler = Callable[[Service, Any], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path. As an ASGI application it answers requests."""

    api: Api
    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    reply: type[BaseModel] | None = None  # None: no JSON
    stream: str | None = None  # media type of the streaming form
    heavy: bool = False  # counts against max_requests
    media_type: str = "application/json"
    errors: tuple[int, ...] = ()  # statuses besides those that every endpoint has
    parameters: tuple[str, ...] = field(default=())  # of the path

    def bound(self, service: Service, counter: Counter) -> BoundEndpoint:
        return BoundEndpoint(self, service, counter)


@dataclass(slots=True)
class Counter:
    """Requests that run or wait in the engine."""

    most: int
    n: int = 0


class ClientGone(Exception):
    """The client has closed its connection."""


class BoundEndpoint:
    """An endpoint of one server."""

    def __init__(self, endpoint: Endpoint, service: Service, counter: Counter) -> None:
        self._endpoint = endpoint
        self._service = service
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint, service = self._endpoint, self._service
        begin = time.monotonic()
        status = CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        service.metrics.began()
        taken = False
        try:
            try:
                if endpoint.heavy:
                    self._take()
                    taken = True
                response = await self._response(Request(scope, receive))
            except (ClientGone, ClientDisconnect):
                return
            except Exception as error:
                response = error_response(endpoint.api, error)
            try:
                await response(scope, receive, watched)
            except Exception as error:
                # The connection is broken, or was never one of HTTP: there is nobody to tell.
                _log.warning("%s: an answer could not be sent: %r", endpoint.path, error)
        finally:
            if taken:
                self._counter.n -= 1
            service.metrics.ended(endpoint.path, status)
            elapsed_ms = (time.monotonic() - begin) * 1e3
            _log.info("%s %s %d %.1f ms", endpoint.method, endpoint.path, status, elapsed_ms)

    def _take(self) -> None:
        if self._counter.n >= self._counter.most:
            raise HttpError(
                429,
                f"{self._counter.n} requests are running or waiting, which is the most",
                hint="come back in a moment, or raise max_requests in the configuration",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._counter.n += 1

    async def _response(self, request: Request) -> Response:
        endpoint, config = self._endpoint, self._service.config.server
        body: Any = None
        if endpoint.body is not None:
            try:
                raw = await asyncio.wait_for(
                    read_body(request, config.max_body_bytes), config.body_timeout_s
                )
            except asyncio.TimeoutError:
                raise HttpError(
                    408, f"the request did not arrive within {config.body_timeout_s:g} s"
                ) from None
            body = parse_body(endpoint.body, raw)
        elif endpoint.parameters:
            body = {name: request.path_params[name] for name in endpoint.parameters}
        return await until_disconnect(request, endpoint.handler(self._service, body))


async def read_body(request: Request, most: int) -> bytes:
    """Return the body. Raises HttpError 413 as soon as it is known to be too long."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > most:
        raise _too_long(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_long(most)
        parts.append(part)
    return b"".join(parts)


def _too_long(most: int) -> HttpError:
    return HttpError(
        413,
        f"the request's body has more than {most} bytes",
        hint="raise max_body_bytes in the configuration",
        headers={"Connection": "close"},
    )


def parse_body(model: type[BaseModel], raw: bytes) -> BaseModel:
    """Return the checked body. Raises HttpError 400 that names the key."""
    if not raw.strip():
        raise HttpError(400, "the request has no body", hint="send a JSON object")
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_choice(part))
        text = f"{where}: {first['msg']}" if where else first["msg"]
        raise HttpError(400, text, param=where or None) from None


def _is_choice(part: int | str) -> bool:
    """Whether a part of a place is no key but names one of several types that a value may have."""
    return isinstance(part, str) and (part in _TYPES or "[" in part or part[:1].isupper())


async def until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """Return what `work` returns, or raise ClientGone when the client is gone before that."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                await asyncio.gather(each, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def error_response(api: Api, error: BaseException) -> JSONResponse:
    """Return an error in the envelope of an API."""
    known = errors.as_nexus_error(error)
    return JSONResponse(
        ENVELOPES[api](known),
        status_code=errors.status_of(known),
        headers=errors.headers_of(known),
    )


def api_of(path: str) -> Api:
    """Return whose envelope an error on this path has."""
    if path.startswith("/v1"):
        return "openai"
    return "ollama" if path.startswith("/api") else "llama.cpp"
