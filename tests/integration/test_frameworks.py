"""LangChain's and LlamaIndex' OpenAI classes, unmodified, against `nexus serve` with a real model.

Needs the extra `test-integrations`; what is not installed is skipped.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.served import answer_alone, served, store_of

MODEL = Path(__file__).resolve().parents[1] / "models" / "bitllama-3M-q4_k_m.gguf"
PROMPT = "Once upon a time a little girl named Lily had a cat that liked to sleep in the warm sun"
N_TOKENS = 24
SCHEMA: dict[str, Any] = {
    "title": "Pet",
    "description": "A pet.",
    "type": "object",
    "properties": {"name": {"enum": ["Lily", "Tom"]}, "happy": {"type": "boolean"}},
    "required": ["name", "happy"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of OpenAI's API."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        patch.setenv("LANGSMITH_TRACING", "false")
        with served(store_of(tmp_path_factory.mktemp("home"), {"bit": MODEL})) as url:
            yield f"{url}/v1"


@pytest.fixture(scope="module")
def alone() -> str:
    return answer_alone(MODEL, PROMPT, N_TOKENS)


# -- LangChain -------------------------------------------------------------------------------------


@pytest.fixture
def langchain(base: str) -> Any:
    made = pytest.importorskip("langchain_openai")
    arguments: Any = {"model": "bit", "base_url": base, "api_key": "none", "max_retries": 0}
    return made.ChatOpenAI(**arguments, temperature=0, max_tokens=N_TOKENS)


def test_langchain_chats_as_the_model_does_alone(langchain: Any, alone: str) -> None:
    reply = langchain.invoke(PROMPT)
    assert reply.content == alone
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.usage_metadata["output_tokens"] == N_TOKENS
    parts = list(langchain.stream(PROMPT))
    assert len(parts) > N_TOKENS // 2
    assert "".join(part.content for part in parts) == alone
    used = [p.usage_metadata for p in langchain.stream(PROMPT, stream_usage=True)]
    assert [u["output_tokens"] for u in used if u] == [N_TOKENS]
    assert [r.content for r in langchain.batch([PROMPT] * 4)] == [alone] * 4

    async def test() -> list[str]:
        whole = (await langchain.ainvoke(PROMPT)).content
        return [whole, "".join([part.content async for part in langchain.astream(PROMPT)])]

    assert asyncio.run(test()) == [alone, alone]


def test_langchain_calls_tools(langchain: Any) -> None:
    tools = pytest.importorskip("langchain_core.tools")

    @tools.tool  # type: ignore[untyped-decorator]
    def set_color(color: str) -> str:
        """Set a color."""
        return color

    able = langchain.bind_tools([set_color], tool_choice="set_color").bind(max_tokens=120)
    reply = able.invoke(PROMPT)
    assert [call["name"] for call in reply.tool_calls] == ["set_color"]
    assert isinstance(reply.tool_calls[0]["args"]["color"], str)
    messages = pytest.importorskip("langchain_core.messages")
    answered = messages.ToolMessage("red", tool_call_id=reply.tool_calls[0]["id"])
    asked = [messages.HumanMessage(PROMPT), reply, answered]
    assert langchain.invoke(asked).content


def test_langchain_gets_structured_answers(langchain: Any) -> None:
    for method in ("json_schema", "function_calling"):
        pet = langchain.with_structured_output(SCHEMA, method=method).invoke(PROMPT, max_tokens=120)
        assert set(pet) == {"name", "happy"} and pet["name"] in ("Lily", "Tom"), method


def test_langchain_completes_embeds_and_understands_errors(base: str, langchain: Any) -> None:
    made = pytest.importorskip("langchain_openai")
    arguments: Any = {"base_url": base, "api_key": "none", "max_retries": 0}
    complete = made.OpenAI(model="bit", temperature=0, max_tokens=8, **arguments)
    assert complete.invoke(PROMPT)
    embed = made.OpenAIEmbeddings(model="bit", check_embedding_ctx_length=False, **arguments)
    one, two = embed.embed_documents([PROMPT, "A cat sat on a mat."])
    assert len(one) == len(two) > 8 and one != two
    assert embed.embed_query(PROMPT) == pytest.approx(one)
    with pytest.raises(openai.NotFoundError):
        made.ChatOpenAI(model="gpt-5", **arguments).invoke("x")
    with pytest.raises(openai.BadRequestError, match="context"):
        langchain.invoke("word " * 1000)


# -- LlamaIndex ------------------------------------------------------------------------------------


@pytest.fixture
def llama_index(base: str) -> Any:
    made = pytest.importorskip("llama_index.llms.openai_like")
    return made.OpenAILike(
        model="bit",
        api_base=base,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=256,
        temperature=0,
        max_tokens=N_TOKENS,
        max_retries=0,
    )


def test_llama_index_chats_as_the_model_does_alone(llama_index: Any, alone: str) -> None:
    assert llama_index.complete(PROMPT).text == alone
    *_, last = llama_index.stream_complete(PROMPT)
    assert last.text == alone
    llms = pytest.importorskip("llama_index.core.llms")
    messages = [llms.ChatMessage(role="user", content=PROMPT)]
    assert llama_index.chat(messages).message.content == alone
    *_, part = llama_index.stream_chat(messages)
    assert part.message.content == alone

    async def test() -> str:
        return str((await llama_index.achat(messages)).message.content)

    assert asyncio.run(test()) == alone


def test_llama_index_calls_tools(llama_index: Any) -> None:
    tools = pytest.importorskip("llama_index.core.tools")

    def set_color(color: str) -> str:
        """Set a color."""
        return color

    able = llama_index.model_copy(update={"max_tokens": 120})
    tool = tools.FunctionTool.from_defaults(set_color)
    reply = able.chat_with_tools([tool], user_msg=PROMPT, tool_required=True)
    (call,) = able.get_tool_calls_from_response(reply)
    assert call.tool_name == "set_color" and isinstance(call.tool_kwargs["color"], str)


def test_llama_index_follows_a_schema(llama_index: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    able = llama_index.model_copy(update={"max_tokens": 60})
    reply = able.complete(PROMPT, response_format=wanted)
    assert set(json.loads(reply.text)) == {"name", "happy"}


def test_llama_index_embeds_and_understands_errors(base: str, llama_index: Any) -> None:
    made = pytest.importorskip("llama_index.embeddings.openai_like")
    embed = made.OpenAILikeEmbedding(model_name="bit", api_base=base, api_key="none", max_retries=0)
    one, two = embed.get_text_embedding_batch([PROMPT, "A cat sat on a mat."])
    assert len(one) == len(two) > 8 and one != two
    with pytest.raises(openai.NotFoundError):
        llama_index.model_copy(update={"model": "gpt-5"}).complete("x")
