"""From a request to what the engine generates: limits, several answers at once, and their sum.

Every iterator here is closed when its reader goes away, and closing reaches the engine: it stops
within a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from nexus_ext.errors import Interrupted
from nexus_ext.multiplexer.api import Done, GenerateRequest, Piece
from nexus_ext.server.errors import TimeLimit
from nexus_ext.server.lifecycle import Lifecycle
from nexus_ext.server.service import Service

_log = logging.getLogger("nexus_ext.server")

Event = tuple[int, Piece | Done]  # which answer, and what it got


@dataclass(slots=True)
class Answer:
    """One whole answer."""

    text: str
    pieces: list[Piece]
    done: Done

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]


class Usage:
    """Tokens of all answers to one or more prompts."""

    def __init__(self) -> None:
        self.dones: list[Done] = []
        self._prompts: dict[int, tuple[int, int]] = {}  # prompt -> its tokens, those cached

    @property
    def n_prompt(self) -> int:
        return sum(n for n, _ in self._prompts.values())

    @property
    def n_cached(self) -> int:
        return sum(n for _, n in self._prompts.values())

    @property
    def n_generated(self) -> int:
        return sum(done.n_tokens for done in self.dones)

    def add(self, done: Done, prompt: int = 0) -> None:
        """Count an answer to prompt number `prompt`, which itself counts once."""
        n_prompt, n_cached = self._prompts.get(prompt, (0, 0))
        self._prompts[prompt] = (
            max(n_prompt, done.n_prompt_tokens),
            max(n_cached, done.n_cached_tokens),
        )
        self.dones.append(done)


async def generate(
    service: Service, request: GenerateRequest, keep_alive_s: float | None = None
) -> AsyncGenerator[Piece | Done, None]:
    """Yield what one answer consists of, within the server's time limit.

    Raises TimeLimit, Interrupted when the engine gave the request up, and what engines raise.
    """
    server = service.config.server
    request = replace(request, deadline_s=server.queue_timeout_s)
    end = time.monotonic() + server.request_timeout_s
    if server.log_prompts:
        prompt = await service.engine.detokenize(request.model, request.prompt)
        _log.info("prompt for %s: %r", request.model, prompt)
    lifecycle = Lifecycle(service, request)
    lifecycle.start()
    done: Done | None = None
    failure: BaseException | None = None
    try:
        made = service.engine.generate(request, keep_alive_s=keep_alive_s)
        # The protocol promises that closing stops it: engines are generators.
        async with aclosing(cast("AsyncGenerator[Piece | Done, None]", made)) as events:
            async for event in events:
                if isinstance(event, Done):
                    done = event
                    service.metrics.generated(request.model, event)
                    if event.reason == "abort":
                        raise Interrupted(
                            "the engine gave this request up",
                            hint="ask again: it is shutting down or the model was unloaded",
                        )
                elif time.monotonic() > end:
                    raise TimeLimit(
                        f"the answer took longer than {server.request_timeout_s:g} s",
                        hint="ask for fewer tokens, or raise request_timeout_s in the "
                        "configuration",
                    )
                yield event
    except BaseException as error:
        failure = error
        raise
    finally:
        lifecycle.end(done, failure)


def _numbered(request: GenerateRequest, number: int) -> GenerateRequest:
    """Return the request for answer `number`: the same, with a seed of its own."""
    seed = request.sampling.seed
    if number == 0 or seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + number))


async def generate_many(
    service: Service, request: GenerateRequest, n: int, keep_alive_s: float | None = None
) -> AsyncGenerator[Event, None]:
    """Yield what `n` answers to one prompt consist of, as it comes."""
    if n == 1:
        async with aclosing(generate(service, request, keep_alive_s)) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(maxsize=64)

    async def run(number: int) -> None:
        try:
            async with aclosing(
                generate(service, _numbered(request, number), keep_alive_s)
            ) as events:
                async for event in events:
                    await queue.put((number, event))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(run(number)) for number in range(n)]
    try:
        left = n
        while left:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def events_of_all(
    service: Service, requests: Sequence[GenerateRequest], n: int
) -> AsyncGenerator[Event, None]:
    """Yield what `n` answers to each of several prompts consist of, one prompt after the other."""
    for prompt, request in enumerate(requests):
        async with aclosing(generate_many(service, request, n)) as events:
            async for number, event in events:
                yield prompt * n + number, event


async def answers(
    service: Service, request: GenerateRequest, n: int, keep_alive_s: float | None = None
) -> tuple[list[Answer], Usage]:
    """Return `n` whole answers to one prompt."""
    texts: list[list[str]] = [[] for _ in range(n)]
    pieces: list[list[Piece]] = [[] for _ in range(n)]
    dones: dict[int, Done] = {}
    usage = Usage()
    async with aclosing(generate_many(service, request, n, keep_alive_s)) as events:
        async for number, event in events:
            if isinstance(event, Done):
                dones[number] = event
                usage.add(event)
            else:
                texts[number].append(event.text)
                pieces[number].append(event)
    return [Answer("".join(texts[i]), pieces[i], dones[i]) for i in range(n)], usage


async def answers_to_all(
    service: Service, requests: Sequence[GenerateRequest], n: int
) -> tuple[list[Answer], Usage]:
    """Return `n` answers to each of several prompts, prompt by prompt."""
    total = Usage()
    found: list[Answer] = []
    tasks = [asyncio.ensure_future(answers(service, request, n)) for request in requests]
    try:
        for prompt, task in enumerate(tasks):
            made, usage = await task
            found += made
            for done in usage.dones:
                total.add(done, prompt)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found, total
