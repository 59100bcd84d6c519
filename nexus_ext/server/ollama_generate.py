"""/api/generate, /api/chat, /api/embed and /api/embeddings."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import generate
from nexus_ext.server.ollama_common import (
    durations,
    keep_alive_s,
    no_images,
    request_of,
    timestamp,
)
from nexus_ext.server.ollama_types import (
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    OllamaChatBody,
    OllamaMessage,
)
from nexus_ext.server.openai_completions import unit
from nexus_ext.server.prompts import ChatPrompt, Tools, chat_prompt
from nexus_ext.server.service import Model, Service
from nexus_ext.server.streams import ndjson_reply
from nexus_ext.server.tool_calls import ToolCall

_GO = "a Go template is not run here; the model's own Jinja template is used"


def _variables(think: bool | str | None) -> dict[str, Any]:
    """Return what a template is told of thinking; what the model thinks stays in its text."""
    return {} if think is None else {"enable_thinking": bool(think)}


async def generate_text(service: Service, body: GenerateBody) -> Response:
    """Answer a prompt; without one, load the model (or unload it, with keep_alive 0)."""
    no_images(body.images)
    if body.suffix:
        raise HttpError(400, f"{body.model} does not support insert")
    if body.template:
        raise HttpError(400, _GO, param="template")
    keep = keep_alive_s(body.keep_alive)
    if not body.prompt:
        done = await _load_or_unload(service, body.model, keep)
        return JSONResponse({**_head(body.model), "response": "", **done})
    model = await service.model(body.model)
    prompt = await _prompt(service, model, body, body.prompt)
    request = await request_of(
        service, model, prompt.tokens, body.options, body.format, grammar=prompt.grammar
    )

    def last(pieces: list[int]) -> dict[str, Any]:
        return {"context": [*prompt.tokens, *pieces]}

    values = _generated(service, body.model, request, keep, last)
    return await _reply(service, values, body.stream, "response")


async def _prompt(service: Service, model: Model, body: GenerateBody, text: str) -> ChatPrompt:
    before = list(body.context or [])
    system = body.system if body.system is not None else model.stored.system
    if body.raw or model.template is None:
        full = f"{system}\n\n{text}" if system and not body.raw else text
        if before:
            more = await service.engine.tokenize(model.name, full, add_bos=False, special=True)
            tokens = service.checked(model, [*before, *more])
        else:
            tokens = await service.tokenize_plain(model, full)
        return ChatPrompt(tokens, None, None, ())
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    prompt = await chat_prompt(service, model, messages, variables=_variables(body.think))
    if not before:
        return prompt
    return ChatPrompt(service.checked(model, [*before, *prompt.tokens]), None, None, ())


async def _load_or_unload(service: Service, asked: str, keep: float | None) -> dict[str, Any]:
    name = str(service.library.find(asked).name)
    if keep == 0:  # also a model whose file is gone or broken
        await service.engine.unload(name)
        return {"done": True, "done_reason": "unload"}
    begin = time.monotonic_ns()
    await service.engine.load(name, keep_alive_s=keep)
    elapsed = time.monotonic_ns() - begin
    return {
        "done": True,
        "done_reason": "load",
        "total_duration": elapsed,
        "load_duration": elapsed,
    }


async def chat(service: Service, body: OllamaChatBody) -> Response:
    """Answer a chat; without messages, load the model (or unload it, with keep_alive 0)."""
    keep = keep_alive_s(body.keep_alive)
    for message in body.messages or ():
        no_images(message.images)
    if not body.messages:
        done = await _load_or_unload(service, body.model, keep)
        return JSONResponse({**_head(body.model), "message": _message(""), **done})
    model = await service.model(body.model)
    prompt = await chat_prompt(
        service,
        model,
        [_template_message(message) for message in body.messages],
        tools=_tools(body),
        variables=_variables(body.think),
    )
    request = await request_of(
        service,
        model,
        prompt.tokens,
        body.options,
        body.format,
        grammar=prompt.grammar,
        special=prompt.form is not None,
    )
    values = _chat_parts(service, body.model, request, keep, prompt)
    return await _reply(service, values, body.stream, "message")


def _template_message(message: OllamaMessage) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_name is not None:
        made["name"] = message.tool_name
    if message.tool_calls:
        made["tool_calls"] = [
            {"type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    return made


def _tools(body: OllamaChatBody) -> Tools | None:
    for number, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise HttpError(400, f"tools.{number} is no function with a name", param="tools")
    return Tools(body.tools) if body.tools else None


def _head(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": timestamp()}


def _end(done: Done) -> dict[str, Any]:
    return {"done": True, "done_reason": done.reason, **durations(done)}


async def _generated(
    service: Service,
    name: str,
    request: GenerateRequest,
    keep: float | None,
    last: Callable[[list[int]], dict[str, Any]],
) -> AsyncGenerator[Any, None]:
    tokens: list[int] = []
    async with aclosing(generate(service, request, keep)) as events:
        async for event in events:
            if isinstance(event, Piece):
                tokens += event.tokens
                if event.text:
                    yield {**_head(name), "response": event.text, "done": False}
            else:
                yield {**_head(name), "response": "", **_end(event), **last(tokens)}


async def _chat_parts(
    service: Service,
    name: str,
    request: GenerateRequest,
    keep: float | None,
    prompt: ChatPrompt,
) -> AsyncGenerator[Any, None]:
    reader = prompt.reader()
    async with aclosing(generate(service, request, keep)) as events:
        async for event in events:
            parts: list[str | ToolCall] = []
            if isinstance(event, Piece):
                parts = [event.text] if reader is None else reader.feed(event.text)
            elif reader is not None:
                parts = reader.finish()
            for part in parts:
                if part:
                    yield {**_head(name), "message": _message(part), "done": False}
            if isinstance(event, Done):
                yield {**_head(name), "message": _message(""), **_end(event)}


def _message(part: str | ToolCall) -> dict[str, Any]:
    if isinstance(part, str):
        return {"role": "assistant", "content": part}
    function = {"name": part.name, "arguments": json.loads(part.arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


async def _reply(
    service: Service, values: AsyncGenerator[Any, None], stream: bool | None, key: str
) -> Response:
    """Return the parts as they come, or (stream false) their sum."""
    if stream is not False:
        return await ndjson_reply(values, service.config.server.send_timeout_s)
    texts: list[str] = []
    calls: list[Any] = []
    whole: dict[str, Any] = {}
    async with aclosing(values):
        async for value in values:
            part = value[key]
            if key == "message":
                calls += part.get("tool_calls", ())
                part = part["content"]
            texts.append(part)
            whole = value
    text = "".join(texts)
    if key == "message":
        message: dict[str, Any] = {"role": "assistant", "content": text}
        return JSONResponse({**whole, key: {**message, "tool_calls": calls} if calls else message})
    return JSONResponse({**whole, key: text})


async def embed(service: Service, body: EmbedBody) -> Response:
    """Return unit vectors of texts."""
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    begin = time.monotonic_ns()
    model, vectors, n_tokens = await _vectors(
        service, body.model, texts, body.keep_alive, body.truncate is not False
    )
    if body.dimensions is not None and body.dimensions > model.facts.n_embd:
        raise HttpError(400, f"dimensions is {body.dimensions}, not {model.facts.n_embd} or less")
    return JSONResponse(
        {
            "model": body.model,
            "embeddings": [unit(vector[: body.dimensions]) for vector in vectors],
            "total_duration": time.monotonic_ns() - begin,
            "load_duration": 0,
            "prompt_eval_count": n_tokens,
        }
    )


async def embeddings(service: Service, body: EmbeddingsBody) -> Response:
    """Return the vector of one text, as early versions of Ollama did."""
    texts = [body.prompt] if body.prompt else []
    _, vectors, _ = await _vectors(service, body.model, texts, body.keep_alive, True)
    return JSONResponse({"embedding": vectors[0] if vectors else []})


async def _vectors(
    service: Service, name: str, texts: list[str], keep: Any, truncate: bool
) -> tuple[Model, list[list[float]], int]:
    keep_s = keep_alive_s(keep)
    model = await service.model(name)
    prompts = [await service.tokenize_plain(model, text) for text in texts]
    if truncate:
        prompts = [tokens[: model.facts.n_ctx] for tokens in prompts]
    if not prompts:
        await service.engine.load(model.name, keep_alive_s=keep_s)
        return model, [], 0
    vectors = await service.engine.embed(model.name, prompts, keep_alive_s=keep_s)
    return model, vectors, sum(map(len, prompts))
