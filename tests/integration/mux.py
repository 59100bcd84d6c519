"""What the tests of the multiplexer share: three small models, one question, one answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nexus_ext.multiplexer.api import (
    Done,
    GenerateRequest,
    ModelNotFound,
    Piece,
    Sampling,
)
from nexus_ext.multiplexer.engine import Multiplexer
from nexus_ext.multiplexer.settings import ModelSpec, Settings
from nexus_ext.runtime.batch import Shape
from nexus_ext.runtime.blueprint import blueprint
from nexus_ext.units import MIB

MODELS = Path(__file__).resolve().parents[1] / "models"
PATHS = {
    "bit": MODELS / "bitllama-3M-q4_k_m.gguf",
    "tiny": MODELS / "tinydense-7M-Q4_K_M.gguf",
    "f32": MODELS / "stories260K-f32.gguf",
}
N_CTX, N_UBATCH = 512, 64
GREEDY = Sampling(temperature=0.0)


def find(name: str) -> ModelSpec:
    if name not in PATHS:
        raise ModelNotFound(f"there is no model {name!r}", hint="`nexus list` shows what there is")
    return ModelSpec(name, str(PATHS[name]))


def shape(n_parallel: int = 4) -> Shape:
    return Shape(n_parallel, N_CTX, N_UBATCH, 2)


def takes(name: str, n_parallel: int = 4) -> tuple[int, int]:
    """(fixed part with the vocabulary that tokenizes, units) of a model in bytes."""
    plan = blueprint(PATHS[name], shape(n_parallel))
    return plan.sizes.total + plan.vocabulary_bytes, plan.units_bytes


@asynccontextmanager
async def multiplexer(
    budget_bytes: int = 512 * MIB, find: Callable[[str], ModelSpec] = find, **settings: Any
) -> AsyncIterator[Multiplexer]:
    values = {"n_ctx": N_CTX, "n_ubatch": N_UBATCH, "n_threads": 2, "patience_s": 0.05, **settings}
    mux = Multiplexer(find, Settings(budget_bytes=budget_bytes, **values))
    try:
        yield mux
    finally:
        await mux.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def answer(
    mux: Multiplexer, model: str, prompt: list[int], n: int | None = 8, **more: Any
) -> tuple[list[int], str, Done]:
    tokens: list[int] = []
    text, done = "", None
    sampling = more.pop("sampling", GREEDY)
    request = GenerateRequest(model, prompt, sampling, max_tokens=n, **more)
    async for event in mux.generate(request):
        assert done is None
        if isinstance(event, Piece):
            tokens += event.tokens
            text += event.text
        else:
            done = event
    assert done is not None
    return tokens, text, done


def a_prompt(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(n)]
