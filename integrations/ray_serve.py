"""Ray Serve: the same engine and the same API as a deployment, for more than one machine.

Every replica is a whole server: one budget, several models, continuous batching. Ray decides which
replica a request goes to; a request that names its model in the header `serve_multiplexed_model_id`
goes to one that has it (Ray's model multiplexing). Without the header any replica answers.

    from ray import serve
    from nexus_ext.integrations.ray_serve import application

    serve.run(application({"engine": {"ram": "16G"}}, num_replicas=4))

    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none",
                    default_headers={"serve_multiplexed_model_id": "qwen3:8b"})

The store of models must be readable where the replicas run. Ray counts models, the engine counts
bytes: `max_models` is how many names Ray remembers of a replica, and a model that Ray drops there
is put out of memory; the engine evicts earlier where the budget asks for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nexus_ext.errors import NexusError
from nexus_ext.server.app import create_app
from nexus_ext.server.config import Config
from nexus_ext.server.engine import make_engine
from nexus_ext.store import Library

MODEL_HEADER = "serve_multiplexed_model_id"


class Loaded:
    """A model that Ray knows to be in a replica. Ray calls `__del__` when it drops it."""

    def __init__(self, replica: Replica, name: str) -> None:
        self._replica: Replica | None = replica
        self._loop = asyncio.get_running_loop()
        self.name = name

    def __del__(self) -> None:
        replica, self._replica = self._replica, None
        if replica is not None and not self._loop.is_closed():
            # Ray calls this in a thread of its own, Python wherever the last reference went.
            self._loop.call_soon_threadsafe(replica.drop, self.name)


class Replica:
    """One server inside of Ray. `config` is what nexus.toml holds, as a dictionary."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._config = Config.model_validate(dict(config or {}))
        models = self._config.models
        self._library = Library.at(models.store, ollama=models.ollama, lm_studio=models.lm_studio)
        self._made: tuple[Any, ASGIApp] | None = None
        self._making = threading.Lock()
        self._dropping: set[asyncio.Task[None]] = set()

    def _parts(self) -> tuple[Any, ASGIApp]:
        """Return engine and application, made in the event loop that uses them."""
        with self._making:
            if self._made is None:
                engine = make_engine(self._library, self._config)
                self._made = engine, create_app(engine, self._library, self._config)
            return self._made

    async def load(self, name: str) -> Loaded:
        """Load a model, as Ray asks for it. Raises ModelNotFound and what loading may raise."""
        engine, _ = self._parts()
        await engine.load(str(self._library.find(name).name))
        return Loaded(self, name)

    async def model(self, name: str) -> Loaded:
        """As `load`; Ray puts its own in between, which remembers the newest models."""
        return await self.load(name)

    def drop(self, name: str) -> None:
        """Put a model out of memory once its requests have ended."""
        task = asyncio.ensure_future(self._unload(name))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _unload(self, name: str) -> None:
        engine, _ = self._parts()
        await engine.unload(str(self._library.find(name).name))

    async def __call__(self, request: Request) -> Response:
        """Answer one request of HTTP."""
        _, app = self._parts()
        name = request.headers.get(MODEL_HEADER)
        if name:
            # What is wrong with the model is told by the request itself, in its API's own form.
            with suppress(NexusError):
                await self.model(name)
        return _Forwarded(app)

    async def check_health(self) -> None:
        """Ray asks whether this replica is well; it is when its configuration could be read."""


class _Forwarded(Response):
    """A response that is what the application answers."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def application(
    config: Mapping[str, Any] | None = None, *, max_models: int = 16, **options: Any
) -> Any:
    """Return an application for `serve.run`. `options` are those of `serve.deployment`.

    Raises ImportError without ray (`pip install "ray[serve]"`).
    """
    from ray import serve

    class NexusReplica(Replica):
        # Ray knows a method by its name: it must wrap the one that it replaces.
        model = serve.multiplexed(max_num_models_per_replica=max_models)(Replica.model)

    options.setdefault("name", "nexus")
    options.setdefault("max_ongoing_requests", 256)
    return serve.deployment(**options)(NexusReplica).bind(config)
