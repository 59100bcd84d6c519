"""OpenAI's endpoints over a fake engine: what is asked of it, and what is answered."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nexus_ext.server import openai_types
from nexus_ext.store import Library, ModelName
from tests.fake_engine import FakeEngine, by_bytes, decode, encode
from tests.models_folder import find_model
from tests.server_support import MODEL, client_of, events, library_with

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    file = find_model("stories260K-q4_0.gguf")
    library = library_with(tmp_path_factory.mktemp("store"), file)
    library.own.create(
        ModelName.parse("set"),
        file,
        system="Be brief.",
        parameters={"temperature": 0.25, "stop": ["END"], "num_predict": 3},
    )
    return library


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine([MODEL, "set:latest"])


@pytest.fixture(scope="module")
def client(engine: FakeEngine, library: Library) -> Iterator[httpx.Client]:
    with client_of(engine, library) as client:
        yield client


@pytest.fixture(autouse=True)
def _fresh(engine: FakeEngine) -> None:
    fresh = FakeEngine(engine.models)
    vars(engine).update(vars(fresh))


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER, **body})


def good(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def wrong(response: httpx.Response, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_chat_is_written_by_the_template_and_answered(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.n_cached = 5
    reply = good(chat(client))
    openai_types.ChatReply.model_validate(reply)
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "Hello, wörld!", "refusal": None
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    (request,) = engine.requests
    assert request.prompt[0] == 1, "BOS as the template writes it"
    assert request.prompt.count(1) == 1, "and no second one"
    assert decode(request.prompt) == "<user>hi<go>"
    n = len(request.prompt)
    assert reply["usage"] == {
        "prompt_tokens": n,
        "completion_tokens": 14,
        "total_tokens": n + 14,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_no_limit_is_minus_one(client: httpx.Client, engine: FakeEngine) -> None:
    good(chat(client, max_tokens=-1))
    good(chat(client, max_tokens=5, max_completion_tokens=-1))
    good(complete(client, max_tokens=-1))
    assert [request.max_tokens for request in engine.requests] == [None] * 3
    good(chat(client, max_tokens=0))
    assert engine.requests[-1].max_tokens == 0
    wrong(chat(client, max_tokens=-2))


def test_what_is_sent_first_by_mistake_is_told_in_words(client: httpx.Client) -> None:
    assert "no body" in wrong(client.post("/v1/chat/completions"))["message"]
    assert "Invalid JSON" in wrong(client.post("/v1/completions", content=b"x"))["message"]
    assert wrong(chat(client, stop=5))["message"].startswith("stop: ")
    assert wrong(chat(client, tool_choice="some"))["param"] == "tool_choice"
    for path, meant in (
        ("/chat/completions", "/v1/chat/completions"),
        ("/completion", "/v1/completions"),
        ("/v1/embedding", "/v1/embeddings"),
    ):
        response = client.post(path, json={})
        assert response.status_code == 404
        assert f"did you mean {meant}?" in response.json()["error"]["message"]
    assert "did you mean" not in client.get("/v1/images").text


def test_every_parameter_reaches_the_engine(client: httpx.Client, engine: FakeEngine) -> None:
    good(
        chat(
            client,
            temperature=0.5,
            top_p=0.5,
            top_k=7,
            min_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            repeat_penalty=1.5,
            seed=11,
            logit_bias={"5": -100},
            stop=["x", "y"],
            max_completion_tokens=9,
            prompt_cache_key="talk",
            grammar='root ::= "a"',
        )
    )
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.5, 7)
    assert (sampling.min_p, sampling.repeat_penalty, sampling.seed) == (0.25, 1.5, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.logit_bias == {5: -100} and sampling.grammar == 'root ::= "a"'
    assert request.stop == ("x", "y") and request.max_tokens == 9 and request.session == "talk"
    assert request.deadline_s == 600


def test_a_model_brings_its_own_parameters(client: httpx.Client, engine: FakeEngine) -> None:
    good(chat(client, model="set"))
    (request,) = engine.requests
    assert (request.sampling.temperature, request.stop, request.max_tokens) == (0.25, ("END",), 3)
    assert decode(request.prompt) == "<system>Be brief.<user>hi<go>"
    good(chat(client, model="set", temperature=1, stop="S", max_tokens=2))
    request = engine.requests[1]
    assert (request.sampling.temperature, request.stop, request.max_tokens) == (1, ("S",), 2)


def test_a_stream_says_the_same_as_the_whole(client: httpx.Client, engine: FakeEngine) -> None:
    whole = good(chat(client))["choices"][0]["message"]["content"]
    got = events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert got[-1] == "[DONE]"
    *chunks, last = got[:-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 14
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and all("role" not in d for d in deltas[1:])
    assert "".join(d.get("content", "") for d in deltas) == whole
    assert "\ufffd" not in whole, "a character of two tokens is never split"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_finish_reasons_are_true(client: httpx.Client, engine: FakeEngine) -> None:
    assert good(chat(client, max_tokens=3))["choices"][0]["finish_reason"] == "length"
    stopped = good(chat(client, stop="wör"))["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("Hello, ", "stop")
    streamed = events(chat(client, max_tokens=3, stream=True))
    assert streamed[-2]["choices"][0]["finish_reason"] == "length"


def test_several_choices_have_seeds_of_their_own(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: by_bytes(f"seed {request.sampling.seed}")
    reply = good(chat(client, n=3, seed=5))
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert texts == ["seed 5", "seed 6", "seed 7"]
    assert reply["usage"]["completion_tokens"] == 18
    assert reply["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    parts = ["", "", ""]
    for event in events(chat(client, n=3, seed=5, stream=True))[:-1]:
        (choice,) = event["choices"]
        parts[choice["index"]] += choice["delta"].get("content", "")
    assert parts == texts


def test_log_probabilities_name_bytes(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: by_bytes("ö")
    reply = good(chat(client, logprobs=True, top_logprobs=2))
    openai_types.ChatReply.model_validate(reply)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xC3], [0xB6]]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2]
    streamed = events(chat(client, logprobs=True, stream=True))
    tokens = [e["choices"][0]["logprobs"]["content"] for e in streamed[:-2]]
    assert [t[0]["bytes"] for t in tokens] == [[0xC3], [0xB6]]
    wrong(chat(client, top_logprobs=2))


def test_tools_are_offered_called_and_answered(client: httpx.Client, engine: FakeEngine) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    engine.script = lambda request: by_bytes("Hm. " + call)
    reply = good(chat(client, tools=[TOOL]))
    openai_types.ChatReply.model_validate(reply)
    (choice,) = reply["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Hm."
    assert made["function"] == {"name": "add", "arguments": '{"a": 1}'}
    (request,) = engine.requests
    assert request.special and '"name": "add"' in decode(request.prompt)
    assert request.sampling.grammar is None
    got = events(chat(client, tools=[TOOL], stream=True))
    deltas = [event["choices"][0]["delta"] for event in got[:-1]]
    (streamed,) = [d["tool_calls"][0] for d in deltas if d.get("tool_calls")]
    assert streamed["index"] == 0 and streamed["function"] == made["function"]
    assert got[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any("<" in (d.get("content") or "") for d in deltas)
    good(
        chat(
            client,
            tools=[TOOL],
            messages=[
                *USER,
                {"role": "assistant", "content": None, "tool_calls": [made]},
                {"role": "tool", "tool_call_id": made["id"], "content": "2"},
            ],
        )
    )
    assert '<assistant>[add {"a": 1}]<tool>2' in decode(engine.requests[-1].prompt)


def test_a_required_call_is_a_matter_of_grammar(client: httpx.Client, engine: FakeEngine) -> None:
    good(chat(client, tools=[TOOL], tool_choice="required"))
    named = {"type": "function", "function": {"name": "add"}}
    good(chat(client, tools=[TOOL], tool_choice=named))
    for request in engine.requests:
        assert request.sampling.grammar is not None
        assert request.sampling.grammar.startswith('root ::= "<tool_call>')
    good(chat(client, tools=[TOOL], tool_choice="none"))
    assert engine.requests[-1].sampling.grammar is None
    assert "add" not in decode(engine.requests[-1].prompt)
    assert wrong(chat(client, tool_choice="required"))["param"] == "tools"
    other = {"type": "function", "function": {"name": "rm"}}
    assert wrong(chat(client, tools=[TOOL], tool_choice=other))["param"] == "tool_choice"


def test_a_template_without_tools_refuses_them(client: httpx.Client, engine: FakeEngine) -> None:
    engine.chat_template = "{{ messages[0].content }}"
    assert wrong(chat(client, tools=[TOOL]))["param"] == "tools"


def test_forms_of_answers_become_grammars(client: httpx.Client, engine: FakeEngine) -> None:
    good(chat(client, response_format={"type": "json_object"}))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
    good(chat(client, response_format=wanted))
    any_object, city = (request.sampling.grammar or "" for request in engine.requests)
    assert "root ::= object" in any_object and r'"\"city\""' in city
    good(chat(client, response_format={"type": "text"}))
    assert engine.requests[-1].sampling.grammar is None
    wrong(chat(client, response_format={"type": "json_schema"}))
    bad = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "bogus"}}}
    assert "bogus" in wrong(chat(client, response_format=bad))["message"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("functions", [{"name": "f", "parameters": {}}]), ("modalities", ["text", "audio"])],
)
def test_what_would_change_an_answer_is_not_left_out_silently(
    client: httpx.Client, key: str, value: Any
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    url = "/v1/chat/completions"
    error = wrong(client.post(url, json={**body, key: value}))
    assert error["param"] == key
    for harmless in (None, [], ["text"][: key == "modalities"]):
        assert client.post(url, json={**body, "max_tokens": 1, key: harmless}).status_code == 200


def test_content_in_parts_is_text_and_images_are_refused(
    client: httpx.Client, engine: FakeEngine
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    good(chat(client, messages=[{"role": "developer", "content": parts}]))
    assert decode(engine.requests[0].prompt) == "<system>ab<go>"
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    error = wrong(chat(client, messages=[{"role": "user", "content": [image]}]))
    assert "image_url" in error["message"]


def test_what_is_wrong_with_a_request_is_named(client: httpx.Client, engine: FakeEngine) -> None:
    assert wrong(chat(client, model="nope"), 404)["code"] == "model_not_found"
    assert wrong(chat(client, temperature="hot"))["param"] == "temperature"
    assert wrong(chat(client, messages=[]))["param"] == "messages"
    assert wrong(chat(client, logit_bias={"x": 1}))["param"] == "logit_bias"
    assert wrong(chat(client, logit_bias={"9999": 1}))["param"] == "logit_bias"
    assert wrong(chat(client, n=99))["param"] == "n"
    wrong(client.post("/v1/chat/completions", content=b"{"))
    wrong(client.post("/v1/chat/completions", content=b'{"model": "tiny"}'))
    wrong(client.post("/v1/chat/completions", content=b"[" * 100_000))
    wrong(client.get("/v1/chat/completions"), 405)
    wrong(client.get("/v1/nothing"), 404)
    engine.chat_template = "{{ raise_exception('no system') }}"
    assert "no system" in wrong(chat(client))["message"]
    engine.chat_template = "{{ ''.__class__.__mro__ }}"
    assert "unsafe" in wrong(chat(client))["message"]
    engine.chat_template = None
    assert "no chat template" in wrong(chat(client))["message"]
    engine.chat_template, engine.n_ctx = "{{ messages[0].content }}", 2
    assert wrong(chat(client))["code"] == "context_length_exceeded"


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "Once", **body})


def test_texts_are_completed(client: httpx.Client, engine: FakeEngine) -> None:
    reply = good(complete(client, max_tokens=5))
    openai_types.CompletionReply.model_validate(reply)
    assert reply["choices"][0]["text"] == "Hello"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert engine.requests[0].prompt == [1, *encode("Once")]
    good(complete(client))
    assert engine.requests[1].max_tokens == 16
    assert good(complete(client, echo=True))["choices"][0]["text"] == "OnceHello, wörld!"
    streamed = events(complete(client, stream=True, echo=True))
    assert "".join(e["choices"][0]["text"] for e in streamed[:-1]) == "OnceHello, wörld!"


def test_lists_of_prompts_have_answers_in_order(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: by_bytes(decode(request.prompt).upper())
    reply = good(complete(client, prompt=["a", "b"], n=2))
    assert [c["text"] for c in reply["choices"]] == ["A", "A", "B", "B"]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 4
    assert good(complete(client, prompt=encode("x")))["choices"][0]["text"] == "X"
    texts = ["", ""]
    got = events(
        complete(client, prompt=[[70], [71]], stream=True, stream_options={"include_usage": True})
    )
    for event in got[:-2]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [decode([70]).upper(), decode([71]).upper()]
    assert got[-2]["usage"]["prompt_tokens"] == 2
    for prompt in ([], [[]], [99999], [-1]):
        wrong(complete(client, prompt=prompt))


def test_completions_have_log_probabilities(client: httpx.Client, engine: FakeEngine) -> None:
    reply = good(complete(client, logprobs=2, max_tokens=3))
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"] and logprobs["text_offset"] == [0, 1, 2]
    assert all(len(best) == 2 for best in logprobs["top_logprobs"])
    got = events(complete(client, logprobs=1, max_tokens=3, stream=True))
    offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in got[:-2]]
    assert offsets == [[0], [1], [2]]


def test_what_completions_do_not_have_is_refused(client: httpx.Client) -> None:
    assert wrong(complete(client, suffix="x"))["param"] == "suffix"
    assert wrong(complete(client, best_of=2))["param"] == "best_of"
    assert wrong(complete(client, echo=True, logprobs=1))["param"] == "echo"


def test_embeddings_are_unit_vectors(client: httpx.Client, engine: FakeEngine) -> None:
    def embed(**body: Any) -> httpx.Response:
        return client.post("/v1/embeddings", json={"model": "tiny", "input": "abc", **body})

    reply = good(embed(input=["abc", "d"]))
    openai_types.EmbeddingsReply.model_validate(reply)
    vectors = [entry["embedding"] for entry in reply["data"]]
    assert all(abs(sum(x * x for x in v) - 1) < 1e-9 for v in vectors)
    assert reply["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    packed = good(embed(encoding_format="base64"))["data"][0]["embedding"]
    floats = struct.unpack("<4f", base64.b64decode(packed))
    assert floats == pytest.approx(vectors[0])
    assert len(good(embed(dimensions=2))["data"][0]["embedding"]) == 2
    assert wrong(embed(dimensions=5))["param"] == "dimensions"
    wrong(embed(model="nope"), 404)


def responses(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"model": "tiny", "input": "hi", **body})


def test_responses_are_answered(client: httpx.Client, engine: FakeEngine) -> None:
    reply = good(responses(client, instructions="Be."))
    (item,) = reply["output"]
    assert item["content"][0]["text"] == "Hello, wörld!" and reply["status"] == "completed"
    assert decode(engine.requests[0].prompt) == "<system>Be.<user>hi<go>"
    cut = good(responses(client, max_output_tokens=2))
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["usage"]["output_tokens"] == 2
    for body in (
        {"previous_response_id": "x"},
        {"background": True},
        {"input": []},
        {"input": [{"type": "reasoning"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": [{"role": "user", "content": 5}]},
        {"input": [{"type": "function_call_output", "call_id": "c"}]},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "required"},
        {"text": {"format": {"type": "json_schema"}}},
    ):
        wrong(responses(client, **body))


def test_a_streamed_response_ends_with_the_whole(client: httpx.Client, engine: FakeEngine) -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    engine.script = lambda request: by_bytes(
        'Hm. <tool_call>{"name": "add", "arguments": {}}</tool_call>'
    )
    got = events(responses(client, stream=True, tools=[tool]))
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    kinds = [event["type"] for event in got]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    text = "".join(e["delta"] for e in got if e["type"] == "response.output_text.delta")
    message, call = got[-1]["response"]["output"]
    assert message["content"][0]["text"] == text == "Hm."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "add", "{}")
    again = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ]
    engine.script = lambda request: by_bytes("3")
    assert good(responses(client, input=again, tools=[tool]))["output"][0]["content"]
    assert "<assistant>[add {}]<tool>3" in decode(engine.requests[-1].prompt)


def test_models_are_listed_and_described(client: httpx.Client) -> None:
    reply = good(client.get("/v1/models"))
    openai_types.ModelsReply.model_validate(reply)
    assert [entry["id"] for entry in reply["data"]] == ["set:latest", "tiny:latest"]
    assert good(client.get("/v1/models/tiny"))["id"] == "tiny:latest"
    wrong(client.get("/v1/models/nope"), 404)
    assert client.get("/v1/models/../../etc/passwd").status_code == 404
    wrong(client.get("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), 404)


def test_an_error_in_the_middle_ends_a_stream_with_an_error(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.fail_after = 3
    wrong(chat(client), 500)
    got = events(chat(client, stream=True))
    assert [e["choices"][0]["delta"]["content"] for e in got[:-1]] == ["H", "e", "l"]
    assert got[-1]["error"]["code"] == "internal_error"
    assert "broke" not in json.dumps(got[-1]), "what nobody foresaw is not told to clients"
    engine.fail_after = None
    good(chat(client))
    assert engine.n_running == 0
