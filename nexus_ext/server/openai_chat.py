"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Answer, Usage, answers, generate_many
from nexus_ext.server.openai_common import (
    FINGERPRINT,
    chat_logprobs,
    finish_reason,
    new_id,
    now,
    request_of,
    usage_of,
)
from nexus_ext.server.openai_types import ChatBody, NamedTool, ResponseFormat
from nexus_ext.server.prompts import ChatPrompt, Tools, chat_prompt, form_grammar, template_message
from nexus_ext.server.service import Service
from nexus_ext.server.streams import sse_reply
from nexus_ext.server.tool_calls import ToolCall, ToolReader


async def chat(service: Service, body: ChatBody) -> Response:
    """Answer a chat."""
    model = await service.model(body.model)
    messages = [
        template_message(message.model_dump(exclude_none=True), f"messages.{number}")
        for number, message in enumerate(body.messages)
    ]
    if body.top_logprobs is not None and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    prompt = await chat_prompt(
        service,
        model,
        messages,
        tools=tools_of(body),
        grammar=await response_grammar(body.response_format),
        variables=body.chat_template_kwargs,
    )
    request = request_of(
        service,
        model,
        body,
        prompt.tokens,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=prompt.grammar,
        special=prompt.form is not None,
    )
    n = body.n or 1
    if body.stream:
        values = _chunks(service, body, request, prompt, n)
        return await sse_reply(values, service.config.server.send_timeout_s)
    made, usage = await answers(service, request, n)
    return JSONResponse(
        {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": body.model,
            "system_fingerprint": FINGERPRINT,
            "choices": [
                _choice(number, answer, prompt, bool(body.logprobs))
                for number, answer in enumerate(made)
            ],
            "usage": usage_of(usage),
        }
    )


def tools_of(body: ChatBody) -> Tools | None:
    """Return the tools that may be called. Raises HttpError when the choice names none of them."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        if choice == "required" or isinstance(choice, NamedTool):
            raise HttpError(400, "tool_choice asks for a call, but there is no tool", param="tools")
        return None
    definitions = [tool.model_dump(exclude_none=True) for tool in body.tools]
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if only is not None and only not in [tool.function.name for tool in body.tools]:
        raise HttpError(400, f"tool_choice names {only!r}, no tool of it", param="tool_choice")
    return Tools(definitions, required=choice == "required", only=only)


async def response_grammar(wanted: ResponseFormat | None) -> str | None:
    """Return the grammar of a response_format."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return await form_grammar(None)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise HttpError(
            400, "response_format of type json_schema has no schema", param="response_format"
        )
    return await form_grammar(wanted.json_schema.schema_)


def split(answer: Answer, reader: ToolReader | None) -> tuple[str, list[ToolCall]]:
    """Return the text of an answer and the calls in it."""
    if reader is None:
        return answer.text, []
    parts = [*reader.feed(answer.text), *reader.finish()]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [part for part in parts if isinstance(part, ToolCall)]


def _choice(number: int, answer: Answer, prompt: ChatPrompt, logprobs: bool) -> dict[str, Any]:
    text, calls = split(answer, prompt.reader())
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = [call.as_openai for call in calls]
    return {
        "index": number,
        "message": message,
        "logprobs": chat_logprobs(answer.pieces) if logprobs else None,
        "finish_reason": finish_reason(answer.done, bool(calls)),
    }


async def _chunks(
    service: Service, body: ChatBody, request: GenerateRequest, prompt: ChatPrompt, n: int
) -> AsyncGenerator[Any, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }
    if with_usage:
        head["usage"] = None
    readers = [prompt.reader() for _ in range(n)]
    n_calls = [0] * n
    began = [False] * n
    usage = Usage()

    def chunk(number: int, delta: Any, logprobs: Any = None, finish: str | None = None) -> Any:
        if not began[number]:
            began[number] = True
            delta = {"role": "assistant", "content": "", **delta}
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice]}

    def deltas(number: int, parts: list[str | ToolCall]) -> list[Any]:
        made: list[Any] = []
        for part in parts:
            if isinstance(part, str):
                made.append({"content": part})
            else:
                made.append({"tool_calls": [{"index": n_calls[number], **part.as_openai}]})
                n_calls[number] += 1
        return made

    async with aclosing(generate_many(service, request, n)) as events:
        async for number, event in events:
            reader = readers[number]
            if isinstance(event, Piece):
                logprobs = chat_logprobs((event,)) if body.logprobs else None
                if reader is None:
                    if event.text or logprobs or not began[number]:
                        yield chunk(number, {"content": event.text}, logprobs)
                    continue
                parts = deltas(number, reader.feed(event.text))
                if not parts and (logprobs or not began[number]):
                    parts = [{}]
                for part in parts:
                    yield chunk(number, part, logprobs)
                    logprobs = None
            elif isinstance(event, Done):
                usage.add(event)
                for part in deltas(number, reader.finish() if reader is not None else []):
                    yield chunk(number, part)
                yield chunk(number, {}, None, finish_reason(event, n_calls[number] > 0))
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(usage)}
    yield "[DONE]"
