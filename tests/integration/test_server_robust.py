"""Clients that go away, limits, keys, foreign pages, readiness, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nexus_ext.errors import ReadFailed, UsageError
from nexus_ext.multiplexer.api import Overloaded
from nexus_ext.server import Config
from nexus_ext.server.config import ModelsConfig, ServerConfig
from nexus_ext.server.serving import bind
from nexus_ext.store import Library
from tests.fake_engine import FakeEngine, by_bytes
from tests.models_folder import find_model
from tests.server_support import MODEL, LiveServer, client_of, events, library_with, live, until

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ENDLESS = 100_000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return library_with(tmp_path_factory.mktemp("store"), find_model("stories260K-q4_0.gguf"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([MODEL])


def endless(engine: FakeEngine) -> FakeEngine:
    """Let it produce a token whenever the test gives it one."""
    engine.script = lambda request: [b"x"] * ENDLESS
    engine.gate = asyncio.Semaphore(0)
    return engine


class Tokens:
    """Gives tokens to an engine of another thread."""

    def __init__(self, server: LiveServer, engine: FakeEngine) -> None:
        self._server, self._engine = server, engine

    def give(self, n: int) -> None:
        loop = self._server.loop
        assert loop is not None and self._engine.gate is not None
        for _ in range(n):
            loop.call_soon_threadsafe(self._engine.gate.release)


def config(**server: Any) -> Config:
    return Config(server=ServerConfig(**server))


def raw_request(path: str, body: Any, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_within_a_token(
    engine: FakeEngine, library: Library, path: str, stream: bool
) -> None:
    body = {**CHAT, "stream": stream}
    if path == "/v1/responses":
        body = {"model": "tiny", "input": "hi", "stream": stream}
    with live(endless(engine), library) as server:
        tokens = Tokens(server, engine)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw_request(path, body))
            tokens.give(3)
            until(lambda: engine.n_produced == 3, "three tokens")
            if stream:
                assert b"200 OK" in client.recv(1 << 16)
        until(lambda: engine.n_running == 0, "the request to end")
        assert engine.n_produced <= 4 and engine.n_abandoned == 1


def test_several_choices_all_end_with_their_client(engine: FakeEngine, library: Library) -> None:
    with live(endless(engine), library) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw_request("/v1/chat/completions", {**CHAT, "n": 4, "stream": True}))
            until(lambda: engine.n_running == 4, "four answers")
            Tokens(server, engine).give(4)
            until(lambda: engine.n_produced == 4, "four tokens")
        until(lambda: engine.n_running == 0, "all of them to end")
        assert engine.n_abandoned == 4


def test_a_client_that_goes_away_before_the_first_token_is_noticed(
    engine: FakeEngine, library: Library
) -> None:
    with live(endless(engine), library) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw_request("/v1/chat/completions", {**CHAT, "stream": True}))
            until(lambda: engine.n_running == 1, "the request to run")
        until(lambda: engine.n_running == 0, "the request to end")
        assert engine.n_produced == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_a_stream_begins_before_its_first_token_if_that_takes_long(
    engine: FakeEngine, library: Library, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_ext.server.streams.PATIENCE_S", 0.01)
    with (
        live(endless(engine), library) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=20) as client,
    ):
        asked = {**CHAT, "stream": True, "max_tokens": 2, "options": {"num_predict": 2}}
        with client.stream("POST", path, json=asked) as response:
            assert response.status_code == 200 and engine.n_produced == 0
            Tokens(server, engine).give(2)
            text = response.read().decode()
        assert "[DONE]" in text or '"done": true' in text
        engine.fail_after = 0
        with client.stream("POST", path, json=asked) as response:
            Tokens(server, engine).give(1)
            assert "mistake" in response.read().decode()


def test_more_requests_than_allowed_are_told_to_come_back(
    engine: FakeEngine, library: Library
) -> None:
    with (
        live(endless(engine), library, config(max_requests=1)) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
        socket.create_connection(("127.0.0.1", server.port)) as first,
    ):
        first.sendall(raw_request("/v1/chat/completions", CHAT))
        until(lambda: engine.n_running == 1, "the first request to run")
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200, "looking costs no place"
        first.close()
        until(lambda: engine.n_running == 0, "the first request to end")
        Tokens(server, engine).give(2)
        again = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        assert again.status_code == 200


def test_a_full_queue_says_when_to_come_back(engine: FakeEngine, library: Library) -> None:
    engine.error = Overloaded("the queue of tiny is full", retry_after_s=7.2)
    with client_of(engine, library) as client:
        for path, body in (("/v1/chat/completions", CHAT), ("/api/chat", CHAT)):
            for stream in (True, False):
                refused = client.post(path, json={**body, "stream": stream})
                assert refused.status_code == 503 and refused.headers["retry-after"] == "7"
                assert "queue" in refused.text


def test_a_read_error_is_one_answer_and_the_next_request_works(
    engine: FakeEngine, library: Library
) -> None:
    engine.error = ReadFailed("m.gguf cannot be read at offset 7", path="m.gguf", offset=7)
    with client_of(engine, library) as client:
        failed = client.post("/v1/chat/completions", json=CHAT)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "read_failed"
        engine.error = None
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_bodies_have_a_limit(engine: FakeEngine, library: Library) -> None:
    with client_of(engine, library, config(max_body_bytes=1000)) as client:
        long = {**CHAT, "user": "x" * 1000}
        assert client.post("/v1/chat/completions", json=long).status_code == 413

        def chunks() -> Iterator[bytes]:  # without a length that could be looked at
            for _ in range(20):
                yield b" " * 100

        assert client.post("/v1/chat/completions", content=chunks()).status_code == 413
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(engine: FakeEngine, library: Library) -> None:
    with (
        live(engine, library, config(body_timeout_s=0.05)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.sendall(raw_request("/v1/chat/completions", CHAT)[:-5])
        assert b"408" in client.recv(1 << 16).split(b"\r\n")[0]


def test_prompts_and_answers_have_limits(engine: FakeEngine, library: Library) -> None:
    limits = config(max_prompt_tokens=5, max_output_tokens=2)
    with client_of(engine, library, limits) as client:
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert reply.json()["choices"][0] == {
            "index": 0, "text": "He", "logprobs": None, "finish_reason": "length"
        }  # fmt: skip


def test_an_answer_may_not_take_forever(engine: FakeEngine, library: Library) -> None:
    engine.script = lambda request: [b"x"] * ENDLESS
    with client_of(engine, library, config(request_timeout_s=0.02)) as client:
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 504 and refused.json()["error"]["code"] == "time_limit"
        got = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        assert got[-1]["error"]["code"] == "time_limit"
    assert engine.n_running == 0 and engine.n_produced < 2 * ENDLESS


def test_a_client_that_does_not_read_is_dropped(engine: FakeEngine, library: Library) -> None:
    engine.script = lambda request: [b"x" * 10_000] * ENDLESS
    with live(engine, library, config(send_timeout_s=0.1)) as server:
        for number, path in enumerate(("/v1/chat/completions", "/api/chat"), 1):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(raw_request(path, {**CHAT, "stream": True}))
                until(lambda n=number: engine.n_abandoned == n, f"{path} to give up")
    assert engine.n_running == 0 and engine.n_produced < 2 * ENDLESS


def test_keys_are_asked_for_everywhere_but_where_one_only_looks(
    engine: FakeEngine, library: Library
) -> None:
    with client_of(engine, library, config(api_keys=["one", "two"])) as client:
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic one"},
                       {"Authorization": "Bearer"}, {"Authorization": "Bearer onee"}):  # fmt: skip
            refused = client.get("/v1/models", headers=header)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/api/tags", headers=header).status_code == 401
            assert client.get("/metrics", headers=header).status_code == 401
        for key in ("one", "two"):
            header = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=header).status_code == 200
        assert client.get("/health").status_code == 200


def test_foreign_pages_and_names_are_refused(engine: FakeEngine, library: Library) -> None:
    with client_of(engine, library) as client:
        page = {"Origin": "https://evil.example"}
        assert client.post("/api/chat", json=CHAT, headers=page).status_code == 403
        rebound = {"Host": "evil.example:80"}
        assert client.get("/api/tags", headers=rebound).status_code == 403
        own = {"Origin": str(client.base_url).rstrip("/")}
        assert client.get("/api/tags", headers=own).status_code == 200
        assert client.get("/api/tags", headers={"Host": "localhost:1"}).status_code == 200
    allowed = config(cors_origins=["https://good.example"], allowed_hosts=["ai.lan"])
    with client_of(engine, library, allowed) as client:
        page = {"Origin": "https://good.example"}
        answered = client.get("/api/tags", headers=page)
        assert answered.headers["access-control-allow-origin"] == "https://good.example"
        preflight = {**page, "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/chat/completions", headers=preflight).status_code == 200
        assert client.get("/api/tags", headers={"Host": "ai.lan"}).status_code == 200
        page = {"Origin": "https://evil.example"}
        assert client.get("/api/tags", headers=page).status_code == 403


def test_prompts_are_logged_only_when_asked_for(
    engine: FakeEngine, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    secret = {**CHAT, "messages": [{"role": "user", "content": "s3cret"}]}
    engine.script = lambda request: by_bytes("answered")
    with caplog.at_level(logging.DEBUG):
        with client_of(engine, library) as client:
            client.post("/v1/chat/completions", json=secret)
        assert "/v1/chat/completions 200" in caplog.text
        assert "s3cret" not in caplog.text and "answered" not in caplog.text
        with client_of(engine, library, config(log_prompts=True)) as client:
            client.post("/v1/chat/completions", json=secret)
        assert "s3cret" in caplog.text


def test_health_waits_for_the_models_to_preload(engine: FakeEngine, library: Library) -> None:
    engine.gate = asyncio.Semaphore(0)
    settings = Config(models=ModelsConfig(preload=["tiny"]))
    with (
        live(engine, library, settings) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        waiting = client.get("/health")
        assert waiting.status_code == 503 and "loading tiny" in waiting.text
        Tokens(server, engine).give(1)
        until(lambda: client.get("/health").status_code == 200, "readiness")
    assert engine.closed
    settings = Config(models=ModelsConfig(preload=["nope"]))
    with client_of(engine, library, settings) as client:
        until(lambda: "no model" in client.get("/health").text, "the reason")
        assert client.get("/health").status_code == 503


PROGRAM = """
import asyncio, sys
sys.path.append({root!r})
from pathlib import Path
from nexus_ext.server import Config
from nexus_ext.server.config import ServerConfig
from nexus_ext.server.serving import serve
from tests.fake_engine import FakeEngine
from tests.server_support import MODEL, library_with

engine = FakeEngine([MODEL])
engine.script = lambda request: [b"x"] * {n}
class Slow:
    async def acquire(self): await asyncio.sleep({pause})
engine.gate = Slow()
library = library_with(Path({store!r}), Path({model!r}))
config = Config(server=ServerConfig(port=0, shutdown_s={shutdown}))
serve(lambda: engine, library, config, ready=lambda url: print(url, flush=True))
print("closed", engine.closed, engine.n_running, flush=True)
"""


def refuses_connections(url: str) -> bool:
    try:
        httpx.get(url, trust_env=False)
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:  # it was taken, and not answered any more
        return False
    return False


@pytest.mark.parametrize(
    ("n", "shutdown", "signals", "finishes"),
    [
        (20, 10, [signal.SIGTERM], True),
        (20, 10, [signal.SIGHUP], True),
        (10_000, 1, [signal.SIGTERM], False),
        (10_000, 60, [signal.SIGINT, signal.SIGINT], False),
    ],
)
def test_a_signal_lets_requests_finish_until_the_deadline_or_a_second_ctrl_c(
    tmp_path: Path, repository: Path, n: int, shutdown: int, signals: list[int], finishes: bool
) -> None:
    program = textwrap.dedent(PROGRAM).format(
        root=str(repository), store=str(tmp_path), model=str(find_model("stories260K-q4_0.gguf")),
        n=n, pause=0.02, shutdown=shutdown,
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # Under nohup it would be ignored, and so by what is started.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        parts: list[bytes] = []
        began = threading.Event()

        def read() -> None:
            try:
                with httpx.stream(
                    "POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True},
                    trust_env=False,
                ) as response:  # fmt: skip
                    for part in response.iter_raw():
                        parts.append(part)
                        began.set()
            except httpx.HTTPError:
                pass  # what has come is looked at below

        reader = threading.Thread(target=read)
        reader.start()
        assert began.wait(20)
        process.send_signal(signals[0])
        for number in signals[1:]:
            until(lambda: refuses_connections(url), "the end to begin")
            process.send_signal(number)
        out, err = process.communicate(timeout=20)
        reader.join()
        assert "Traceback" not in err
        assert process.returncode == 0 and out.strip() == "closed True 0"
        assert (b"[DONE]" in b"".join(parts)) is finishes
    finally:
        process.kill()
        process.wait()


def test_an_address_that_cannot_be_had_is_told_with_what_to_do() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}") as error:
            bind("127.0.0.1", port)
        assert "--port" in error.value.hint and "another server" in error.value.hint
    with pytest.raises(UsageError, match="256") as error:
        bind("256.0.0.1", 0)
    assert "--host" in error.value.hint
