"""Ray Serve: the engine as a deployment. The replica alone is tested without Ray."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nexus_ext import Llama
from nexus_ext.errors import ModelNotFound
from nexus_ext.integrations import ray_serve
from nexus_ext.integrations.ray_serve import MODEL_HEADER, Replica
from nexus_ext.server.config import Config
from nexus_ext.store import Library
from tests.fake_engine import FakeEngine
from tests.models_folder import find_model
from tests.server_support import MODEL, library_with


class Request:
    """The part of a request that a replica looks at."""

    def __init__(self, **headers: str) -> None:
        self.headers = headers


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine([MODEL])

    def make(library: Library, config: Config) -> FakeEngine:
        assert config.engine.n_ctx == 77
        return engine

    monkeypatch.setattr(ray_serve, "make_engine", make)
    return engine


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    library_with(tmp_path, find_model("stories260K-q4_0.gguf"))
    models = {"store": str(tmp_path), "ollama": "", "lm_studio": ""}
    return {"engine": {"n_ctx": 77}, "models": models}


def test_a_replica_loads_what_the_header_names_and_answers_as_the_server_does(
    engine: FakeEngine, config: dict[str, Any]
) -> None:
    async def ask() -> httpx.Response:
        replica = Replica(config)
        request: Any = Request(**{MODEL_HEADER: "tiny"})
        app: Any = await replica(request)
        assert engine.loaded == {MODEL}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 5}
            return await client.post("/v1/completions", json=body)

    response = asyncio.run(ask())
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == "Hello"


def test_a_model_that_ray_drops_leaves_memory(engine: FakeEngine, config: dict[str, Any]) -> None:
    async def drop() -> None:
        replica = Replica(config)
        loaded = await replica.load("tiny")
        assert engine.loaded == {MODEL} and loaded.name == "tiny"
        await asyncio.to_thread(loaded.__del__)
        del loaded
        gc.collect()
        for _ in range(100):
            await asyncio.sleep(0)
            if not engine.loaded:
                break
        assert engine.loaded == set()

    asyncio.run(drop())


def test_an_unknown_model_is_told_by_the_request_itself(
    engine: FakeEngine, config: dict[str, Any]
) -> None:
    async def ask() -> httpx.Response:
        replica = Replica(config)
        with pytest.raises(ModelNotFound):
            await replica.load("nope")
        request: Any = Request(**{MODEL_HEADER: "nope"})
        app: Any = await replica(request)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"model": "nope", "prompt": "x"})

    response = asyncio.run(ask())
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.slow
def test_a_local_ray_serves_a_real_model(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray import serve

    file = find_model("bitllama-3M-q8_0.gguf")
    library_with(tmp_path / "store", file, "bit:latest", "bit:two")
    config = {
        "engine": {"budget": "64M", "n_ctx": 256},
        "models": {"store": str(tmp_path / "store"), "ollama": "", "lm_studio": ""},
    }
    llm = Llama(str(file), n_ctx=256, verbose=False)
    alone = llm("Once upon a time", max_tokens=16, temperature=0)["choices"][0]["text"]
    llm.close()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False)
    try:
        application = ray_serve.application(
            config, max_models=1, num_replicas=1, ray_actor_options={"num_cpus": 1}
        )
        serve.start(http_options={"port": 18765})
        serve.run(application)
        for name in ("bit", "bit:two", "bit"):
            with openai.OpenAI(
                base_url="http://127.0.0.1:18765/v1",
                api_key="none",
                max_retries=0,
                default_headers={MODEL_HEADER: name},
                http_client=openai.DefaultHttpxClient(trust_env=False),
            ) as client:
                asked: Any = {"model": name, "prompt": "Once upon a time", "max_tokens": 16}
                reply = client.completions.create(**asked, temperature=0)
                assert reply.choices[0].text == alone
                chunks = client.completions.create(**asked, temperature=0, stream=True)
                assert "".join(chunk.choices[0].text for chunk in chunks) == alone
                with pytest.raises(openai.NotFoundError):
                    client.completions.create(model="nope", prompt="x")
    finally:
        serve.shutdown()
        ray.shutdown()
