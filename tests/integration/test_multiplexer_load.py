"""Two hundred requests over three models in half their memory: long prompts, conversations that go
on after a swap, readers that are slow or go away. Every answer is that of its model alone.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexus_ext.multiplexer.api import GenerateRequest, Piece
from nexus_ext.multiplexer.engine import Multiplexer
from nexus_ext.multiplexer.prefix import chunk_end
from nexus_ext.units import MIB
from tests.integration.alone import Alone
from tests.integration.mux import (
    GREEDY,
    N_CTX,
    N_UBATCH,
    PATHS,
    a_prompt,
    answer,
    multiplexer,
    takes,
)

LENGTHS = (1, 9, 65, 130, 200, 300, 420, 480)


@dataclass
class Asked:
    """Requests that are alone, or the turns of one conversation."""

    model: str
    kind: str  # "plain", "slow", "leaves", "session" or "again": a conversation without a name
    prompt: list[int]
    n: int
    turns: list[list[int]] = field(default_factory=list)  # what is added after each answer
    answers: list[list[int]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)  # tokens of each prompt that were not computed


def requests(rng: random.Random, most: int) -> list[Asked]:
    made: list[Asked] = []
    total = 0
    while total < most:
        model = rng.choice(list(PATHS))
        kind = rng.choice(("plain", "plain", "slow", "leaves", "session", "again"))
        prompt = a_prompt(total, rng.choice(LENGTHS))
        asked = Asked(model, kind, prompt, rng.randint(1, 16))
        if kind in ("session", "again"):
            asked.prompt = prompt[:260]
            asked.turns = [a_prompt(1000 + total + i, rng.randint(1, 50)) for i in range(3)]
        total += 1 + len(asked.turns)
        made.append(asked)
    return made


async def ask(mux: Multiplexer, number: int, asked: Asked) -> None:
    prompt = asked.prompt
    if asked.kind in ("slow", "leaves"):
        request = GenerateRequest(asked.model, prompt, GREEDY, max_tokens=asked.n)
        tokens: list[int] = []
        stream = mux.generate(request)
        async for event in stream:
            if isinstance(event, Piece):
                tokens += event.tokens
            await asyncio.sleep(0.005)
            if asked.kind == "leaves" and len(tokens) > asked.n // 2:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        asked.answers.append(tokens)
        return
    session = f"talk {number}" if asked.kind == "session" else None
    for more in [*asked.turns, []]:
        tokens, _, done = await answer(mux, asked.model, prompt, asked.n, session=session)
        assert done.n_prompt_tokens == len(prompt) and done.n_tokens == len(tokens)
        asked.answers.append(tokens)
        asked.cached.append(done.n_cached_tokens)
        prompt = [*prompt, *tokens, *more]
        await asyncio.sleep(0.02)  # a user reads; others come first


def check(alone: Alone, asked: Asked) -> None:
    prompt = asked.prompt
    if asked.kind != "session":
        for tokens, more in zip(asked.answers, [*asked.turns, []], strict=False):
            expected = alone.tokens(prompt, asked.n)
            assert tokens == expected[: len(tokens)], (asked.kind, len(prompt))
            assert asked.kind == "leaves" or len(tokens) == len(expected)
            prompt = [*prompt, *tokens, *more]
        return
    at = 0  # tokens whose state one process that keeps its context would have
    alone.clear()
    turns = zip(asked.answers, [*asked.turns, []], asked.cached, strict=True)
    for number, (tokens, more, cached) in enumerate(turns):
        at = min(at, len(prompt) - 1)
        assert cached == at or not number, "nothing of it is computed twice, wherever it was"
        alone.keep(at)
        while at < len(prompt):
            end = chunk_end(at, len(prompt), N_UBATCH)
            logits = alone.decode(prompt[at:end], at)
            at = end
        found: list[int] = []
        while len(found) < asked.n and not alone.ends(int(logits.argmax())):
            found.append(int(logits.argmax()))
            if len(found) < asked.n:
                logits = alone.decode(found[-1:], at)
                at += 1
        assert tokens == found, (asked.model, len(prompt))
        prompt = [*prompt, *tokens, *more]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_requests_of_all_kinds(seed: int, tmp_path: Path) -> None:
    whole = [takes(name) for name in PATHS]
    sessions = 24 * MIB
    budget = sum(sum(parts) for parts in whole) // 2 + sessions
    everything = requests(random.Random(seed), 200)
    settings = {
        "session_ram_bytes": sessions,
        "session_disk_bytes": 1 << 30,
        "session_directory": tmp_path,
    }

    async def test() -> Counter[str]:
        async with multiplexer(budget, **settings) as mux:
            few = asyncio.Semaphore(10)

            async def one(number: int, asked: Asked) -> None:
                async with few:
                    await ask(mux, number, asked)
                    used, total = mux.budget()
                    assert used <= total == budget

            await asyncio.gather(*(one(i, asked) for i, asked in enumerate(everything)))
            unexplained = [
                event
                for event in mux.log.events()
                if event.kind in ("evict", "unload") and not event.why.strip()
            ]
            assert not unexplained
            return Counter(event.kind for event in mux.log.events())

    kinds = asyncio.run(asyncio.wait_for(test(), 600))
    assert kinds["evict"] + kinds["unload"] > 5 and kinds["resume"] > 0
    for name, path in PATHS.items():
        alone = Alone(path, N_CTX, N_UBATCH)
        for asked in everything:
            if asked.model == name:
                check(alone, asked)
        alone.close()
