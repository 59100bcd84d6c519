"""/v1/completions and /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Usage, answers_to_all, generate_many
from nexus_ext.server.openai_common import (
    FINGERPRINT,
    finish_reason,
    new_id,
    now,
    request_of,
    text_logprobs,
    usage_of,
)
from nexus_ext.server.openai_types import CompletionBody, EmbeddingBody
from nexus_ext.server.service import Model, Service
from nexus_ext.server.streams import sse_reply

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048


async def prompts_of(service: Service, model: Model, asked: Any, param: str) -> list[list[int]]:
    """Return the tokens of each prompt. Raises HttpError when there is none, or too many."""
    if isinstance(asked, str):
        asked = [asked]
    if not asked:
        raise HttpError(400, f"{param} is an empty list", param=param)
    if isinstance(asked[0], int):
        asked = [asked]
    if len(asked) > MAX_PROMPTS:
        raise HttpError(400, f"{param} has {len(asked)} entries, the most is {MAX_PROMPTS}")
    return [
        await service.tokenize_plain(model, each)
        if isinstance(each, str)
        else service.checked(model, list(each))
        for each in asked
    ]


async def completions(service: Service, body: CompletionBody) -> Response:
    """Complete texts."""
    if body.suffix:
        raise HttpError(400, "this server completes at the end only", param="suffix")
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise HttpError(400, f"best_of is {body.best_of}, only n ({n}) is served", param="best_of")
    if body.echo and body.logprobs is not None:
        raise HttpError(400, "echo has no logprobs of the prompt here", param="echo")
    model = await service.model(body.model)
    prompts = await prompts_of(service, model, body.prompt, "prompt")
    if len(prompts) * n > MAX_PROMPTS:
        raise HttpError(400, f"{len(prompts)} prompts, {n} answers each, are too many", param="n")
    requests = [
        request_of(
            service,
            model,
            body,
            tokens,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            grammar=None,
        )
        for tokens in prompts
    ]
    echoes = [""] * len(prompts)
    if body.echo:
        echoes = [await service.engine.detokenize(model.name, tokens) for tokens in prompts]
    if body.stream:
        values = _chunks(service, body, requests, n, echoes)
        return await sse_reply(values, service.config.server.send_timeout_s)
    made, usage = await answers_to_all(service, requests, n)
    return JSONResponse(
        {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": body.model,
            "system_fingerprint": FINGERPRINT,
            "choices": [
                {
                    "index": index,
                    "text": echoes[index // n] + answer.text,
                    "logprobs": None if body.logprobs is None else text_logprobs(answer.pieces),
                    "finish_reason": finish_reason(answer.done),
                }
                for index, answer in enumerate(made)
            ],
            "usage": usage_of(usage),
        }
    )


async def _events(
    service: Service, requests: list[GenerateRequest], n: int
) -> AsyncGenerator[tuple[int, Piece | Done], None]:
    """Yield the events of all prompts, one prompt after the other."""
    for number, request in enumerate(requests):
        async with aclosing(generate_many(service, request, n)) as events:
            async for choice, event in events:
                yield number * n + choice, event


async def _chunks(
    service: Service,
    body: CompletionBody,
    requests: list[GenerateRequest],
    n: int,
    echoes: list[str],
) -> AsyncGenerator[Any, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head: dict[str, Any] = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }
    if with_usage:
        head["usage"] = None
    offsets = [0] * (len(requests) * n)
    began = [False] * (len(requests) * n)
    total = Usage()

    def chunk(index: int, text: str, logprobs: Any, finish: str | None) -> Any:
        if not began[index]:
            began[index] = True
            text = echoes[index // n] + text
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice]}

    prompts_counted = set()
    async with aclosing(_events(service, requests, n)) as events:
        async for index, event in events:
            if isinstance(event, Piece):
                logprobs = None
                if body.logprobs is not None:
                    logprobs = text_logprobs((event,), offsets[index])
                    offsets[index] += sum(map(len, logprobs["tokens"]))
                if event.text or logprobs is not None:
                    yield chunk(index, event.text, logprobs, None)
            else:
                if index // n not in prompts_counted:
                    prompts_counted.add(index // n)
                    total.n_prompt += event.n_prompt_tokens
                    total.n_cached += event.n_cached_tokens
                total.n_generated += event.n_tokens
                yield chunk(index, "", None, finish_reason(event))
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(total)}
    yield "[DONE]"


async def embeddings(service: Service, body: EmbeddingBody) -> Response:
    """Return one unit vector for each text."""
    model = await service.model(body.model)
    prompts = await prompts_of(service, model, body.input, "input")
    if body.dimensions is not None and body.dimensions > model.facts.n_embd:
        raise HttpError(
            400,
            f"dimensions is {body.dimensions}, the model has {model.facts.n_embd}",
            param="dimensions",
        )
    vectors = await service.engine.embed(model.name, prompts)
    units = [unit(vector[: body.dimensions]) for vector in vectors]
    await asyncio.sleep(0)  # many vectors take a moment to write: let others go on
    n_tokens = sum(map(len, prompts))
    return JSONResponse(
        {
            "object": "list",
            "model": body.model,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _base64(vector) if body.encoding_format == "base64" else vector,
                }
                for index, vector in enumerate(units)
            ],
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }
    )


def unit(vector: list[float]) -> list[float]:
    """Return the vector with length 1; a zero vector stays what it is."""
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector] if length > 0 else list(vector)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
