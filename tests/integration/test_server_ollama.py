"""Ollama's endpoints, and llama.cpp's conveniences, over a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nexus_ext.store import Library, ModelName
from tests.fake_engine import FakeEngine, by_bytes, decode, encode
from tests.models_folder import find_model
from tests.server_support import MODEL, client_of, library_with, lines

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return library_with(tmp_path_factory.mktemp("store"), find_model("stories260K-q4_0.gguf"))


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine([MODEL, "copy:latest", "made:v1"])


@pytest.fixture(autouse=True)
def _fresh(engine: FakeEngine) -> None:
    vars(engine).update(vars(FakeEngine(engine.models)))


@pytest.fixture(scope="module")
def client(engine: FakeEngine, library: Library) -> Iterator[httpx.Client]:
    with client_of(engine, library) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/{path}", json={"model": "tiny", **body})


def good(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def wrong(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    return str(response.json()["error"])


def test_generate_streams_lines_and_ends_with_durations(
    client: httpx.Client, engine: FakeEngine
) -> None:
    response = post(client, "generate", prompt="hi")
    assert response.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines(response)
    assert "".join(part["response"] for part in parts) == "Hello, wörld!"
    assert all(part["done"] is False and part["model"] == "tiny" for part in parts)
    assert (last["done"], last["done_reason"]) == (True, "stop")
    prompt = engine.requests[0].prompt
    assert {key: last[key] for key in last if "duration" in key or "count" in key} == {
        "total_duration": 10_000,
        "load_duration": 3_000,
        "prompt_eval_count": len(prompt),
        "prompt_eval_duration": 3_000,
        "eval_count": 14,
        "eval_duration": 4_000,
    }
    whole = good(post(client, "generate", prompt="hi", stream=False))
    assert whole["response"] == "Hello, wörld!" and whole["done"] is True
    assert whole["context"] == last["context"] == [*prompt, *encode("Hello, wörld!")]


def test_generate_uses_the_template_unless_it_is_told_not_to(
    client: httpx.Client, engine: FakeEngine
) -> None:
    good(post(client, "generate", prompt="hi", system="S", stream=False))
    good(post(client, "generate", prompt="hi", system="S", raw=True, stream=False))
    engine.chat_template = None
    good(post(client, "generate", prompt="hi", system="S", stream=False))
    texts = [decode(request.prompt) for request in engine.requests]
    assert texts == ["<system>S<user>hi<go>", "hi", "S\n\nhi"]
    good(post(client, "generate", prompt="more", context=[70, 71], raw=True, stream=False))
    assert engine.requests[-1].prompt == [70, 71, *encode("more")]


def test_options_format_and_keep_alive_reach_the_engine(
    client: httpx.Client, engine: FakeEngine
) -> None:
    options = {"temperature": 0, "seed": 3, "num_predict": 4, "stop": ["l"], "top_k": 5,
               "num_thread": 8}  # fmt: skip
    reply = good(
        post(client, "chat", messages=USER, options=options, keep_alive="10m", stream=False)
    )
    assert reply["message"] == {"role": "assistant", "content": "He"}
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.seed) == (0, 3)
    assert (request.sampling.top_k, request.max_tokens, request.stop) == (5, 4, ("l",))
    assert engine.keep_alives == [600]
    good(post(client, "chat", messages=USER, format="json", keep_alive=-1, stream=False))
    schema = {"type": "object", "properties": {"x": {"type": "null"}}}
    good(post(client, "chat", messages=USER, format=schema, stream=False))
    grammars = [r.sampling.grammar or "" for r in engine.requests[1:]]
    assert "root ::= object" in grammars[0] and r'"\"x\""' in grammars[1]
    assert engine.keep_alives[1:] == [-1, None]
    good(post(client, "chat", messages=USER, options={"num_predict": -1}, stream=False))
    assert engine.requests[-1].max_tokens is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("250ms", 0.25), (0, 0), ("-1", -1), (-5, -1), ("90", 90)],
)
def test_keep_alive_is_a_number_or_a_duration(
    client: httpx.Client, engine: FakeEngine, text: Any, seconds: float
) -> None:
    good(post(client, "embed", input=[], keep_alive=text))
    assert engine.keep_alives == [seconds]


def test_without_a_prompt_a_model_is_loaded_or_unloaded(
    client: httpx.Client, engine: FakeEngine
) -> None:
    assert good(post(client, "generate"))["done_reason"] == "load"
    assert engine.loaded == {MODEL}
    assert good(post(client, "chat", keep_alive=0))["done_reason"] == "unload"
    assert engine.loaded == set()


def test_tools_in_ollamas_form(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: by_bytes(
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    )
    reply = good(post(client, "chat", messages=USER, tools=[TOOL], stream=False))
    (call,) = reply["message"]["tool_calls"]
    assert call == {"function": {"name": "add", "arguments": {"a": 1}}}
    assert engine.requests[0].special
    history = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_name": "add"},
    ]
    parts = lines(post(client, "chat", messages=history, tools=[TOOL]))
    assert parts[0]["message"]["tool_calls"] == [call] and parts[-1]["done"]
    assert '[add {"a": 1}]<tool>2' in decode(engine.requests[-1].prompt)
    wrong(post(client, "chat", messages=USER, tools=[{"type": "function"}]))


def test_what_is_not_supported_is_refused_clearly(client: httpx.Client) -> None:
    image = [{"role": "user", "content": "x", "images": ["aGk="]}]
    assert "images" in wrong(post(client, "chat", messages=image))
    assert "images" in wrong(post(client, "generate", prompt="x", images=["aGk="]))
    assert "insert" in wrong(post(client, "generate", prompt="x", suffix="y"))
    assert "Go template" in wrong(post(client, "generate", prompt="x", template="{{ . }}"))
    assert "keep_alive" in wrong(post(client, "generate", prompt="x", keep_alive="soon"))
    assert "temperature" in wrong(
        post(client, "generate", prompt="x", options={"temperature": "x"})
    )
    assert "top_p" in wrong(post(client, "generate", prompt="x", options={"top_p": 7}))
    assert "nope" in wrong(post(client, "generate", model="nope", prompt="x"), 404)
    wrong(client.post("/api/chat", content=b"nonsense"))
    wrong(client.get("/api/chat"), 405)
    wrong(client.get("/api/nothing"), 404)


def test_an_error_in_the_middle_is_the_last_line(client: httpx.Client, engine: FakeEngine) -> None:
    engine.fail_after = 2
    *parts, last = lines(post(client, "generate", prompt="x"))
    assert len(parts) == 2 and set(last) == {"error"}
    wrong(post(client, "generate", prompt="x", stream=False), 500)


def test_embeddings_in_both_forms(client: httpx.Client) -> None:
    reply = good(post(client, "embed", input=["a", "bc"]))
    assert len(reply["embeddings"]) == 2 and reply["prompt_eval_count"] == 5
    assert all(abs(sum(x * x for x in v) - 1) < 1e-9 for v in reply["embeddings"])
    assert good(post(client, "embed", input=[]))["embeddings"] == []
    assert good(post(client, "embeddings", prompt="a"))["embedding"] == [2, 0, 3, 4]
    assert good(post(client, "embeddings"))["embedding"] == []
    wrong(post(client, "embed", input="a", dimensions=9))


def test_models_are_listed_shown_copied_made_and_deleted(
    client: httpx.Client, library: Library, engine: FakeEngine
) -> None:
    (entry,) = good(client.get("/api/tags"))["models"]
    assert entry["name"] == MODEL and len(entry["digest"]) == 64
    assert entry["details"]["family"] == "llama"
    assert entry["details"]["quantization_level"] == "Q4_0"
    shown = good(post(client, "show"))
    assert shown["model_info"]["general.architecture"] == "llama"
    assert "tools" in shown["capabilities"] and "FROM /" in shown["modelfile"]
    assert client.post(
        "/api/copy", json={"source": "tiny", "destination": "copy"}
    ).status_code == 200  # fmt: skip
    statuses = lines(
        client.post(
            "/api/create",
            json={"model": "made:v1", "from": "copy", "system": "S", "parameters": {"top_k": 3}},
        )
    )
    assert statuses[-1] == {"status": "success"}
    made = library.find("made:v1")
    assert (made.system, made.parameters) == ("S", {"top_k": 3})
    assert "PARAMETER top_k" in good(post(client, "show", model="made:v1"))["modelfile"]
    response = client.request("DELETE", "/api/delete", json={"model": "copy"})
    assert response.status_code == 200
    assert [str(name) for name in library.names()] == ["made:v1", "tiny:latest"]
    wrong(client.request("DELETE", "/api/delete", json={"model": "copy"}), 404)
    wrong(client.request("DELETE", "/api/delete", json={}))
    wrong(client.post("/api/copy", json={"source": "tiny", "destination": "../x"}))
    wrong(client.post("/api/create", json={"model": "a/../b", "from": "tiny"}))
    wrong(client.post("/api/create", json={"model": "x", "from": "/etc/passwd"}), 404)
    wrong(client.post("/api/create", json={"model": "x", "files": {"a": "sha256:1"}}))
    wrong(client.post("/api/create", json={"model": "x"}))


def test_a_model_whose_file_is_gone_can_be_put_out_of_memory_and_deleted(
    engine: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(find_model("stories260K-q4_0.gguf").read_bytes())
    library = library_with(tmp_path / "store", file)
    with client_of(engine, library) as client:
        file.unlink()
        assert good(post(client, "generate", keep_alive=0))["done_reason"] == "unload"
        assert client.request("DELETE", "/api/delete", json={"model": "tiny"}).status_code == 200
    assert library.names() == []


def test_a_model_of_another_store_is_not_deleted(
    tmp_path: Path, engine: FakeEngine, library: Library
) -> None:
    folder = tmp_path / "lm" / "u" / "r"
    folder.mkdir(parents=True)
    file = folder / "m.gguf"
    file.write_bytes(find_model("stories260K-q4_0.gguf").read_bytes())
    both = Library.at(library.own.root, ollama="", lm_studio=tmp_path / "lm")
    with client_of(engine, both) as client:
        response = client.request("DELETE", "/api/delete", json={"model": "u/r:m"})
        assert "lm-studio" in wrong(response)
    assert file.is_file()


def test_what_runs_is_shown(client: httpx.Client, engine: FakeEngine) -> None:
    assert good(client.get("/api/ps")) == {"models": []}
    good(post(client, "generate"))
    (entry,) = good(client.get("/api/ps"))["models"]
    assert (entry["name"], entry["tier"], entry["resident"]) == (MODEL, "60 % resident", 600)
    assert entry["expires_at"].endswith("Z") and entry["size_vram"] == 0
    assert good(client.get("/slots"))[0]["model"] == MODEL
    assert good(client.get("/props"))["budget"] == {"used": 640, "total": 4096}
    assert good(client.get("/api/version"))["version"]
    assert client.get("/").status_code == 200
    assert good(client.get("/health")) == {"status": "ok"}


def test_tokens_and_texts(client: httpx.Client) -> None:
    body = {"model": "tiny", "content": "hé"}
    assert good(client.post("/tokenize", json=body)) == {"tokens": encode("hé")}
    body = {**body, "add_special": True}
    assert good(client.post("/tokenize", json=body)) == {"tokens": [1, *encode("hé")]}
    body = {"model": "tiny", "tokens": encode("hé")}
    assert good(client.post("/detokenize", json=body)) == {"content": "hé"}
    body = {"model": "tiny", "tokens": [-1]}
    assert client.post("/detokenize", json=body).json()["error"]["code"] == 400
    assert client.post("/tokenize", json={"content": "x"}).status_code == 400, "which model?"
    good(post(client, "generate"))
    assert good(client.post("/tokenize", json={"content": "x"})) == {"tokens": encode("x")}


def counted(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


def test_metrics_count(client: httpx.Client) -> None:
    good(post(client, "generate", prompt="hi", stream=False))
    text = client.get("/metrics").text
    before = counted(text, 'nexus_tokens_total{kind="generated",model="tiny:latest"}')
    good(post(client, "generate", prompt="hi", stream=False))
    text = client.get("/metrics").text
    assert counted(text, 'nexus_tokens_total{kind="generated",model="tiny:latest"}') == before + 14
    assert counted(text, 'nexus_requests_total{path="/api/generate",status="200"}') >= 1
    assert 'nexus_budget_bytes{kind="total"} 4096.0' in text
    assert 'nexus_model_bytes{kind="resident",model="tiny:latest"} 600.0' in text


def test_a_name_of_a_model_is_what_a_store_says(library: Library) -> None:
    assert library.find("tiny").name == ModelName.parse(MODEL)
