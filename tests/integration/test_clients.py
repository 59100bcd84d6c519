"""The unmodified `openai` and `ollama` clients against `nexus serve` with a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from tests.cli_support import call, run
from tests.integration.served import answer_alone, served, store_of
from tests.models_folder import find_model

PROMPT = "Once upon a time a little girl named Lily had a cat that liked to sleep in the warm sun"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Lily", "Tom"]}, "happy": {"type": "boolean"}},
    "required": ["name", "happy"],
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "set_color",
        "description": "Set a color.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": ["red", "blue"]}},
            "required": ["color"],
        },
    },
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store with two real models, and nothing of the user's."""
    bit, tales = find_model("bitllama-3M-q8_0.gguf"), find_model("stories260K-q4_0.gguf")
    made = store_of(tmp_path_factory.mktemp("home"), {"bit": bit, "tales:v1": tales})
    assert run("create", "base", tales, environment=made).status == 0
    return made


@pytest.fixture(scope="module")
def url(environment: dict[str, str]) -> Iterator[str]:
    with served(environment) as url:
        yield url


@pytest.fixture(scope="module")
def one(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=_without_proxy()
    ) as client:
        yield client


def _without_proxy() -> Any:
    return openai.DefaultHttpxClient(trust_env=False)


@pytest.fixture(scope="module")
def two(url: str) -> ollama.Client:
    return ollama.Client(host=url, trust_env=False)


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What each model answers when nothing is in between, greedily."""
    files = {"bit": "bitllama-3M-q8_0.gguf", "tales:v1": "stories260K-q4_0.gguf"}
    return {name: answer_alone(find_model(file), PROMPT, 24) for name, file in files.items()}


@pytest.mark.parametrize("model", ["bit", "tales:v1"])
def test_openai_chats_as_the_model_does_alone(
    one: openai.OpenAI, alone: dict[str, str], model: str
) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    reply = one.chat.completions.create(**asked)
    assert reply.choices[0].message.content == alone[model]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 24
    chunks = list(
        one.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == alone[model]
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached > 0, "the prompt was computed before"


@pytest.mark.parametrize("model", ["bit", "tales:v1"])
def test_ollama_chats_as_the_model_does_alone(
    two: ollama.Client, alone: dict[str, str], model: str
) -> None:
    options = {"temperature": 0, "num_predict": 24}
    reply = two.chat(model, MESSAGES, options=options)
    assert reply.message.content == alone[model] and reply.done_reason == "length"
    assert reply.eval_count == 24 and reply.eval_duration and reply.prompt_eval_count
    parts = list(two.chat(model, MESSAGES, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == alone[model]
    assert two.generate(model, PROMPT, options=options).response == alone[model]
    *_, last = two.generate(model, PROMPT, options=options, stream=True)
    assert last.done and last.context


def test_stops_seeds_choices_and_log_probabilities(
    one: openai.OpenAI, alone: dict[str, str]
) -> None:
    asked: Any = {"model": "bit", "messages": MESSAGES, "max_tokens": 24}
    word = alone["bit"].split()[3]
    stopped = one.chat.completions.create(**asked, temperature=0, stop=word).choices[0]
    assert stopped.message.content == alone["bit"].split(word)[0]
    assert stopped.finish_reason == "stop"
    some = [one.chat.completions.create(**asked, n=2, seed=7, temperature=1.5) for _ in range(2)]
    texts = [[choice.message.content for choice in reply.choices] for reply in some]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    reply = one.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 24
    for token in logprobs.content:
        assert token.logprob == max(best.logprob for best in token.top_logprobs)
    pieces = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert pieces.decode() == alone["bit"]


def test_answers_follow_a_schema(one: openai.OpenAI, two: ollama.Client) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    reply = one.chat.completions.create(
        model="bit", messages=MESSAGES, response_format=wanted, max_tokens=60
    )
    assert reply.choices[0].finish_reason == "stop"
    other = two.chat("bit", MESSAGES, format=SCHEMA, options={"num_predict": 60})
    for text in (reply.choices[0].message.content, other.message.content):
        value = json.loads(text or "")
        assert set(value) == {"name", "happy"} and value["name"] in ("Lily", "Tom")


def test_a_tool_is_called(one: openai.OpenAI, two: ollama.Client) -> None:
    asked: Any = {"model": "bit", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 150}
    reply = one.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.tool_calls
    (call,) = reply.message.tool_calls
    assert call.type == "function" and call.function.name == "set_color"
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    with one.chat.completions.stream(**asked, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls and final.message.tool_calls[0].function.name == "set_color"
    assert two.chat("bit", MESSAGES, tools=[TOOL], options={"num_predict": 4}).done


def test_completions_and_responses(one: openai.OpenAI) -> None:
    reply = one.completions.create(model="base", prompt=[PROMPT, "The"], max_tokens=5)
    assert [choice.index for choice in reply.choices] == [0, 1]
    made = one.responses.create(model="bit", input=PROMPT, max_output_tokens=16, temperature=0)
    assert made.output_text and made.status == "incomplete"
    with one.responses.stream(model="bit", input=PROMPT, max_output_tokens=16) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"


def test_embeddings_of_both_clients_agree(one: openai.OpenAI, two: ollama.Client) -> None:
    texts = [PROMPT, "A cat sat on a mat."]
    mine = [entry.embedding for entry in one.embeddings.create(model="base", input=texts).data]
    other = two.embed("base", texts).embeddings
    for a, b in zip(mine, other, strict=True):
        # The openai client asks for single precision.
        assert b == pytest.approx(a, abs=1e-6)
        assert sum(x * x for x in a) == pytest.approx(1, abs=1e-5)
    assert mine[0] != pytest.approx(mine[1], abs=1e-3)


def test_errors_are_those_that_clients_know(one: openai.OpenAI, two: ollama.Client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        one.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as plain:
        one.chat.completions.create(model="base", messages=MESSAGES)
    assert "no chat template" in str(plain.value)
    with pytest.raises(openai.BadRequestError) as long:
        one.completions.create(model="base", prompt="word " * 1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        one.completions.create(model="base", prompt="x", extra_body={"grammar": "not a grammar"})
    with pytest.raises(ollama.ResponseError) as unknown:
        two.chat("llama3", MESSAGES)
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError):
        list(two.generate("nope", "x", stream=True))


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        r'root ::= "\x00"',
        'root ::= root "a"',
        'root ::= "a"{1,100000}',
        "root ::= [",
        "rule ::= x",
    ],
)
def test_grammars_that_would_end_llama_cpp_are_refused(one: openai.OpenAI, grammar: str) -> None:
    with pytest.raises(openai.BadRequestError, match="grammar"):
        one.completions.create(model="base", prompt="x", extra_body={"grammar": grammar})
    deepest = "root ::= " + "(" * 2000 + '"a"' + ")" * 2000
    reply = one.completions.create(model="base", prompt="x", extra_body={"grammar": deepest})
    assert reply.choices[0].text == "a"


def test_ollama_manages_models(two: ollama.Client) -> None:
    assert two.create("made", from_="bit", system="Be brief.", stream=False).status == "success"
    two.copy("made", "copied")
    names = {model.model for model in two.list().models}
    assert {"bit:latest", "made:latest", "copied:latest", "tales:v1"} <= names
    shown = two.show("copied")
    assert shown.modelinfo and "Be brief." in str(shown.modelfile)
    for name in ("made", "copied"):
        assert two.delete(name).status == "success"
    with pytest.raises(ollama.ResponseError):
        two.delete("copied")


def test_what_runs_is_seen_and_stopped(two: ollama.Client, url: str) -> None:
    two.generate("tales:v1", "", keep_alive="7m")
    assert "tales:v1" in {model.model for model in two.ps().models}
    shown = call("ps", "--host", url).out
    assert "tales:v1" in shown and "7 minutes" in shown and "of 64.0 MiB" in shown
    assert call("stop", "tales:v1", "--host", url).status == 0
    assert "tales:v1" not in {model.model for model in two.ps().models}


def test_texts_become_tokens_and_texts_again(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False) as client:
        body = {"model": "bit", "content": "Once upon a tïme"}
        tokens = client.post("/tokenize", json=body).json()["tokens"]
        answer = client.post("/detokenize", json={"model": "bit", "tokens": tokens})
        assert answer.json()["content"].strip() == "Once upon a tïme"


def test_the_recipes_in_the_documentation_have_their_files(repository: Path) -> None:
    text = (repository / "integrations" / "README.md").read_text(encoding="utf-8")
    for word in ("OLLAMA_HOST", "base_url", "ChatOpenAI", "OpenAILike", "ray_serve"):
        assert word in text
