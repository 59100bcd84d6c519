"""What OpenAI's endpoints share: identifiers, usage, log-probabilities, biases."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from nexus_ext._version import __version__
from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece, TokenLogprob
from nexus_ext.server.errors import HttpError
from nexus_ext.server.generation import Answer, Event, Usage, answers_to_all, events_of_all
from nexus_ext.server.openai_types import AnswerBody
from nexus_ext.server.service import Model, Service
from nexus_ext.server.streams import sse_reply

FINGERPRINT = f"nexus_ext-{__version__}"


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


@dataclass(frozen=True, slots=True)
class Form:
    """What an endpoint's answers look like, in one piece and in chunks."""

    prefix: str  # of the answer's identifier
    whole: str  # kind of object
    part: str  # of a chunk
    choice: Callable[[int, Answer], dict[str, Any]]  # an answer, without its number
    parts: Callable[[int, Piece | Done], list[dict[str, Any]]]  # of an answer that goes on


async def reply(
    service: Service, body: AnswerBody, requests: list[GenerateRequest], form: Form
) -> Response:
    """Answer each of several prompts `body.n` times, at once or as it comes."""
    n = body.n or 1
    if body.stream:
        events = events_of_all(service, requests, n)
        return await sse_reply(_chunks(body, events, n, form), service.config.server.send_timeout_s)
    made, usage = await answers_to_all(service, requests, n)
    choices = [{"index": i, **form.choice(i, answer)} for i, answer in enumerate(made)]
    head = _head(body, form.prefix, form.whole)
    return JSONResponse({**head, "choices": choices, "usage": usage_of(usage)})


async def _chunks(
    body: AnswerBody, events: AsyncGenerator[Event, None], n: int, form: Form
) -> AsyncGenerator[Any, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = _head(body, form.prefix, form.part)
    if with_usage:
        head["usage"] = None
    usage = Usage()
    async with aclosing(events):
        async for number, event in events:
            if isinstance(event, Done):
                usage.add(event, number // n)
            for part in form.parts(number, event):
                yield {**head, "choices": [{"index": number, **part}]}
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(usage)}
    yield "[DONE]"


def _head(body: AnswerBody, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": new_id(prefix),
        "object": kind,
        "created": now(),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.n_prompt,
        "completion_tokens": usage.n_generated,
        "total_tokens": usage.n_prompt + usage.n_generated,
        "prompt_tokens_details": {"cached_tokens": usage.n_cached},
    }


def finish_reason(done: Done, any_call: bool = False) -> str:
    """Return why an answer ended, as OpenAI says it."""
    return "length" if done.reason == "length" else "tool_calls" if any_call else "stop"


def biases(asked: Mapping[str, float] | None) -> dict[int, float] | None:
    """Return logit_bias by token. Raises HttpError for a key that is no token."""
    if asked is None:
        return None
    made = {}
    for key, bias in asked.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise HttpError(400, f"logit_bias has {key!r}, which is no token", param="logit_bias")
        if not -100 <= bias <= 100:
            raise HttpError(
                400, f"logit_bias of {key} is {bias}, not between -100 and 100", param="logit_bias"
            )
        made[int(key)] = bias
    return made


def request_of(
    service: Service,
    model: Model,
    body: AnswerBody,
    tokens: list[int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: str | None,
    special: bool = False,
) -> GenerateRequest:
    """Return what the engine is asked for."""
    if body.grammar is not None and grammar is not None:
        raise HttpError(400, "an answer cannot follow two grammars", param="grammar")
    asked = body.model_dump()
    asked["logit_bias"] = biases(body.logit_bias)
    asked["grammar"] = grammar or body.grammar
    return GenerateRequest(
        model=model.name,
        prompt=tokens,
        sampling=service.sampling(model, asked),
        max_tokens=service.limit(model, max_tokens),
        stop=service.stops(model, body.stop),
        logprobs=logprobs,
        session=body.prompt_cache_key,
        special=special,
    )


def chat_logprobs(pieces: Iterable[Piece]) -> dict[str, Any]:
    content = []
    for piece in pieces:
        for chosen, best in piece.logprobs:
            content.append({**_token(chosen), "top_logprobs": [_token(each) for each in best]})
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.piece.decode("utf-8", "replace"),
        "logprob": _finite(token.logprob),
        "bytes": list(token.piece),
    }


def text_logprobs(pieces: Iterable[Piece], offset: int = 0) -> dict[str, Any]:
    made: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for piece in pieces:
        for chosen, best in piece.logprobs:
            text = chosen.piece.decode("utf-8", "replace")
            made["tokens"].append(text)
            made["token_logprobs"].append(_finite(chosen.logprob))
            made["top_logprobs"].append(
                {b.piece.decode("utf-8", "replace"): _finite(b.logprob) for b in best}
            )
            made["text_offset"].append(offset)
            offset += len(text)
    return made


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)
