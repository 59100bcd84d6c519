"""What plugins add to the server, and what they see of it: routes, metrics, requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client.core import GaugeMetricFamily
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

from nexus_ext import hookimpl
from nexus_ext.errors import OutOfMemory
from nexus_ext.plugins import Plugins
from nexus_ext.policies import RequestInfo, RequestStart, ServerInfo
from nexus_ext.server import create_app
from nexus_ext.server.config import Config, ServerConfig
from nexus_ext.store import Library, ModelName
from nexus_ext.testing import load_plugins
from tests.fake_engine import FakeEngine
from tests.unit.hook_exercises import STORIES

HOST = {"host": "localhost"}


def plugin(name: str, **hooks: Callable[..., Any]) -> ModuleType:
    made = ModuleType(name)
    for hook, function in hooks.items():
        setattr(made, hook, hookimpl(function, specname=hook))
    return made


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    def load(*modules: ModuleType) -> Plugins:
        found = load_plugins(*modules)
        monkeypatch.setattr("nexus_ext.plugins._plugins", found)
        return found

    return load


@pytest.fixture
def library(tmp_path: Path) -> Library:
    made = Library.at(tmp_path / "own", ollama="", lm_studio="")
    made.own.create(ModelName.parse("mine"), STORIES)
    return made


@contextmanager
def server(library: Library, engine: FakeEngine | None = None, **config: Any) -> Iterator[Any]:
    app = create_app(
        engine or FakeEngine(["mine:latest"]), library, Config(server=ServerConfig(**config))
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        client.headers.update(HOST)
        yield client


async def hello(request: Request) -> Response:
    return JSONResponse({"plugin": request.url.path})


def with_routes(name: str, *routes: Any) -> ModuleType:
    def nexus_server_routes(info: ServerInfo) -> list[Any]:
        assert "/v1/models" in info.paths
        return list(routes)

    return plugin(name, nexus_server_routes=nexus_server_routes)


def record(plugins: Plugins, name: str) -> Any:
    return next(r for r in plugins.list_plugins() if r.name == name)


def test_no_route_of_a_plugin_comes_before_one_of_ours(
    use: Callable[..., Plugins], library: Library
) -> None:
    routes = [
        Route("/health", hello),
        Route("/v1/models", hello, methods=["DELETE"]),
        Route("/{anything:path}", hello, methods=["GET", "POST", "PUT"]),
        Route("/mine", hello),
    ]
    plugins = use(with_routes("greedy", *routes))
    with server(library) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json()["object"] == "list"
        assert client.put("/v1/models").status_code == 405
        assert client.delete("/v1/models").status_code == 405
        assert client.get("/mine").json() == {"plugin": "/mine"}
        assert client.get("/else/where").json() == {"plugin": "/else/where"}
    error = record(plugins, "greedy").error
    assert "has the route '/v1/models', which 'nexus_ext' has" in error
    assert record(plugins, "greedy").state == "active"


def test_of_two_plugins_with_one_route_the_first_stays(
    use: Callable[..., Plugins], library: Library
) -> None:
    async def other(request: Request) -> Response:
        return JSONResponse("other")

    plugins = use(with_routes("b", Route("/same", other)), with_routes("a", Route("/same", hello)))
    with server(library) as client:
        assert client.get("/same").json() == {"plugin": "/same"}
    assert "has the route '/same', which 'a' has: it is left out" in record(plugins, "b").error


@pytest.mark.parametrize(
    "route",
    [
        WebSocketRoute("/ws", hello),
        Mount("/mount", routes=[Route("/x", hello)]),
        "/hello",
        None,
    ],
)
def test_what_would_pass_by_the_api_key_is_refused(
    route: Any, use: Callable[..., Plugins], library: Library
) -> None:
    plugins = use(with_routes("open", Route("/fine", hello), route))
    with server(library) as client:
        assert client.get("/fine").status_code == 404
        assert client.get("/health").status_code == 200
    assert record(plugins, "open").disabled == ("nexus_server_routes",)
    assert "which is no starlette.routing.Route" in record(plugins, "open").error


def test_routes_of_plugins_are_behind_the_api_key_and_the_host(
    use: Callable[..., Plugins], library: Library
) -> None:
    use(with_routes("hello", Route("/hello", hello)))
    with server(library, api_keys=["secret"]) as client:
        assert client.get("/hello").status_code == 401
        assert client.get("/hello", headers={"host": "evil.example"}).status_code == 403
        key = {"Authorization": "Bearer secret"}
        assert client.get("/hello", headers=key).status_code == 200


def test_a_handler_that_raises_answers_for_itself_alone(
    use: Callable[..., Plugins], library: Library
) -> None:
    async def crash(request: Request) -> Response:
        raise KeyError("lost")

    def crash_in_a_thread(request: Request) -> Response:
        raise OutOfMemory("no memory")

    async def half(request: Request) -> Response:
        async def parts() -> Any:
            yield b"half"
            raise RuntimeError("broken")

        return StreamingResponse(parts())

    routes = [Route("/v1/crash", crash), Route("/thread", crash_in_a_thread), Route("/half", half)]
    plugins = use(with_routes("crash", *routes))
    with server(library) as client:
        answer = client.get("/v1/crash")
        assert answer.status_code == 500
        message = answer.json()["error"]["message"]
        assert message == "the plugin 'crash' failed at this: KeyError: 'lost'"
        assert client.get("/thread").status_code == 500
        assert client.get("/half").content == b"half"
        assert client.get("/health").status_code == 200
    assert "raised RuntimeError: broken for GET /half" in record(plugins, "crash").error


def test_metrics_that_break_are_left_out_and_the_others_shown(
    use: Callable[..., Plugins], library: Library
) -> None:
    class Good:
        def collect(self) -> Any:
            yield GaugeMetricFamily("good_gauge", "Good.", value=1)

    class Steals:
        def collect(self) -> Any:
            yield GaugeMetricFamily("nexus_budget_bytes", "Not good.", value=1)

    class Bad:
        def collect(self) -> Any:
            yield GaugeMetricFamily("bad_gauge", "Bad.", value="many")  # type: ignore[arg-type]

    class Late(Good):
        pass

    plugins = use(
        *(
            plugin(name, nexus_metrics=lambda kind=kind: kind())
            for name, kind in (("bad", Bad), ("good", Good), ("late", Late), ("steals", Steals))
        )
    )
    with server(library) as client:
        client.get("/metrics")
        text = client.get("/metrics").text
    assert text.count("good_gauge 1.0") == 1 and "bad_gauge" not in text
    assert text.count("# TYPE nexus_budget_bytes gauge") == 1
    assert 'nexus_plugin_disabled{hook="nexus_metrics",plugin="bad"} 1.0' in text
    errors = {name: record(plugins, name).error for name in ("bad", "good", "late", "steals")}
    assert errors["good"] == ""
    assert "ValueError" in errors["bad"]
    assert "has the metric 'good_gauge', which exists" in errors["late"]
    assert "has the metric 'nexus_budget_bytes', which exists" in errors["steals"]


@pytest.fixture
def seen(use: Callable[..., Plugins]) -> tuple[Plugins, list[Any]]:
    """Plugins with one that watches requests, and what it has seen."""
    told: list[Any] = []

    def nexus_request_started(info: RequestStart) -> None:
        told.append(info)

    def nexus_request_done(info: RequestInfo) -> None:
        told.append(info)

    watch = plugin(
        "watch",
        nexus_request_started=nexus_request_started,
        nexus_request_done=nexus_request_done,
    )
    return use(watch), told


def ask(client: Any, **more: Any) -> Any:
    body = {"model": "mine", "prompt": "Hi", "max_tokens": 5, **more}
    return client.post("/v1/completions", json=body)


def test_a_request_is_seen_from_its_start_to_its_end(
    seen: tuple[Plugins, list[Any]], library: Library
) -> None:
    with server(library) as client:
        assert ask(client).status_code == 200
        assert ask(client, max_tokens=1000).status_code == 200
    start, done, _, stopped = seen[1]
    assert isinstance(start, RequestStart) and isinstance(done, RequestInfo)
    assert start.id == done.id != stopped.id
    assert (start.interface, start.model) == ("server", "mine:latest")
    assert (done.outcome, done.n_tokens, done.error) == ("length", 5, "")
    assert done.n_prompt_tokens == start.n_prompt_tokens > 0
    assert (done.model.path, done.model.architecture) == (str(STORIES), "llama")
    assert start.started_unix_ns == done.started_unix_ns <= done.ended_unix_ns
    assert stopped.outcome == "stop"


def test_a_request_that_fails_is_seen_to_fail(
    seen: tuple[Plugins, list[Any]], library: Library
) -> None:
    engine = FakeEngine(["mine:latest"], error=OutOfMemory("no memory for this"))
    with server(library, engine) as client:
        assert ask(client).status_code >= 500
    done = seen[1][-1]
    assert (done.outcome, done.error) == ("error", "OutOfMemory: no memory for this")
    assert done.n_tokens == 0


def test_each_of_several_answers_is_a_request(
    seen: tuple[Plugins, list[Any]], library: Library
) -> None:
    with server(library) as client:
        assert ask(client, n=3).status_code == 200
    done = [info for info in seen[1] if isinstance(info, RequestInfo)]
    assert len(done) == len({info.id for info in done}) == 3
