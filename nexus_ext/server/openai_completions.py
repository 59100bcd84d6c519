"""/v1/completions and /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext.multiplexer.api import Done, Piece
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Answer
from nexus_ext.server.openai_common import Form, finish_reason, reply, request_of, text_logprobs
from nexus_ext.server.openai_types import CompletionBody, EmbeddingBody
from nexus_ext.server.service import Model, Service

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
    return await reply(service, body, requests, _form(body, n, echoes))


def _form(body: CompletionBody, n: int, echoes: list[str]) -> Form:
    """The answers to each prompt begin with its echo."""
    offsets: dict[int, int] = {}  # of answers that have begun: characters of tokens so far

    def choice(number: int, answer: Answer) -> dict[str, Any]:
        return {
            "text": echoes[number // n] + answer.text,
            "logprobs": None if body.logprobs is None else text_logprobs(answer.pieces),
            "finish_reason": finish_reason(answer.done),
        }

    def parts(number: int, event: Piece | Done) -> list[dict[str, Any]]:
        text, logprobs, finish = "", None, None
        if isinstance(event, Done):
            finish = finish_reason(event)
        else:
            text = event.text
            if body.logprobs is not None:
                logprobs = text_logprobs((event,), offsets.get(number, 0))
            if not text and logprobs is None:
                return []
        if number not in offsets:
            offsets[number] = 0
            text = echoes[number // n] + text
        if logprobs is not None:
            offsets[number] += sum(map(len, logprobs["tokens"]))
        return [{"text": text, "logprobs": logprobs, "finish_reason": finish}]

    return Form("cmpl", "text_completion", "text_completion", choice, parts)


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
