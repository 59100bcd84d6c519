"""Responses that go on while tokens are generated: server-sent events, and JSON by lines.

Whatever happens to the connection, the source is closed when the response ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import anyio
from sse_starlette import EventSourceResponse
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from nexus_ext.server.errors import as_nexus_error
from nexus_ext.server.http import ENVELOPES, Api

_log = logging.getLogger("nexus_ext.server")

# Errors show before the first token; after this long the stream begins without one, so that the
# client hears that it is not forgotten (`: ping` comments follow).
PATIENCE_S = 10.0

Encode = Callable[[Any], bytes]


def sse(value: Any) -> bytes:
    """Return an event whose data is JSON, or a text as it is."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def named_sse(value: Any) -> bytes:
    """Return an event with the name that its `type` is, as the Responses API has them."""
    return b"event: " + str(value["type"]).encode() + b"\n" + sse(value)


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class Source:
    """A generator of values whose first one is waited for before the response begins.

    An error before that is raised (and becomes a status); a later one becomes the last value, in
    the envelope of the API.
    """

    def __init__(self, values: AsyncGenerator[Any, None], api: Api, encode: Encode) -> None:
        self._values = values
        self._api = api
        self._encode = encode
        self._first: asyncio.Future[Any] | None = None

    async def start(self) -> Source:
        self._first = asyncio.ensure_future(anext(self._values))
        try:
            await asyncio.wait({self._first}, timeout=PATIENCE_S)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.close()
            raise
        return self

    async def encoded(self) -> AsyncIterator[bytes]:
        try:
            assert self._first is not None
            yield self._encode(await self._first)
            async for value in self._values:
                yield self._encode(value)
        except Exception as error:
            yield self._encode(self._error(error))

    def _error(self, error: Exception) -> dict[str, Any]:
        told = ENVELOPES[self._api](as_nexus_error(error))
        # An event of the Responses API has its name in its type.
        return {"type": "error", **told} if self._encode is named_sse else told

    async def close(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._values.aclose()


class _Closing(Response):
    """Closes the source when the response has ended, however it did."""

    source: Source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            # Nothing can be told to a client that does not read. TCP gives it up (see `serving`).
            _log.info("a client did not read its stream and was given up")
        finally:
            await self.source.close()


class SseReply(_Closing, EventSourceResponse):
    """Server-sent events, with comments while nothing is to be said."""

    def __init__(self, source: Source, send_timeout_s: float) -> None:
        EventSourceResponse.__init__(
            self, source.encoded(), ping=15, sep="\n", send_timeout=send_timeout_s
        )
        self.source = source


class NdjsonReply(_Closing, StreamingResponse):
    """One JSON document a line."""

    def __init__(self, source: Source, send_timeout_s: float) -> None:
        StreamingResponse.__init__(self, source.encoded(), media_type="application/x-ndjson")
        self.source = source
        self._send_timeout_s = send_timeout_s

    async def stream_response(self, send: Send) -> None:
        async def within_time(message: Message) -> None:
            with anyio.fail_after(self._send_timeout_s):
                await send(message)

        await super().stream_response(within_time)


async def sse_reply(
    values: AsyncGenerator[Any, None], send_timeout_s: float, encode: Encode = sse
) -> SseReply:
    return SseReply(await Source(values, "openai", encode).start(), send_timeout_s)


async def ndjson_reply(values: AsyncGenerator[Any, None], send_timeout_s: float) -> NdjsonReply:
    return NdjsonReply(await Source(values, "ollama", line).start(), send_timeout_s)
