"""What the tests of the server share: an application over a fake engine, and a live server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette

from nexus_ext.multiplexer.api import Engine
from nexus_ext.server import Config, create_app
from nexus_ext.store import Library, ModelName
from nexus_ext.store.own import OwnStore

MODEL = "tiny:latest"


def library_with(root: Path, file: Path, *names: str) -> Library:
    """A library without the stores of other programs, in which these names are one file."""
    own = OwnStore(root)
    for name in names or (MODEL,):
        own.create(ModelName.parse(name), file)
    return Library(own)


class LiveServer:
    """uvicorn in a thread, on a port of its own."""

    def __init__(self, app: Starlette, **settings: Any) -> None:
        # With the protocol named: asyncio switches Nagle's algorithm off only then.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="warning", lifespan="on", **settings)
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve([self._socket])

    def __enter__(self) -> LiveServer:
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join()
        self._socket.close()


@contextlib.contextmanager
def live(
    engine: Engine, library: Library, config: Config | None = None, **settings: Any
) -> Iterator[LiveServer]:
    with LiveServer(create_app(engine, library, config), **settings) as server:
        yield server


@contextlib.contextmanager
def client_of(
    engine: Engine, library: Library, config: Config | None = None, **settings: Any
) -> Iterator[httpx.Client]:
    with (
        live(engine, library, config, **settings) as server,
        httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client,
    ):
        yield client


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; texts that are no JSON as they are."""
    found: list[Any] = []
    for line in response.text.split("\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def lines(response: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


def until(condition: Any, what: str, limit_s: float = 20) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.005)
