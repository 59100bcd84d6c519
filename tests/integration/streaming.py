"""Runs to be compared bit by bit: the same tokens through stock and through paged llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexus_ext import Llama
from nexus_ext.errors import DoesNotFit
from nexus_ext.runtime.stock import stock_llama

Bits = npt.NDArray[np.uint32]

SMALL: dict[str, Any] = {
    "n_ctx": 704,
    "n_batch": 704,
    "n_ubatch": 256,
    "n_threads": 2,
    "verbose": False,
}


def prompt(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [1, *(int(t) for t in rng.integers(3, n_vocab, n - 1))]


def logits(llm: Any, tokens: list[int], n_decode: int = 6) -> Bits:
    """Evaluate `tokens`, then decode greedily; the bits of all logits: (n_tokens, n_vocab)."""
    llm.reset()
    llm.eval(tokens)
    parts = [llm.scores[: llm.n_tokens].copy()]
    for _ in range(n_decode):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
        parts.append(llm.scores[llm.n_tokens - 1 : llm.n_tokens].copy())
    return np.concatenate(parts).view(np.uint32)


@contextmanager
def stock(path: Path, **arguments: Any) -> Iterator[Any]:
    llm = stock_llama(str(path), **{**SMALL, "logits_all": True, **arguments})
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def paged(path: Path, weights: int | str, **arguments: Any) -> Iterator[Llama]:
    """A paged model at this weights budget, or at the smallest feasible one if that is larger."""
    arguments = {**SMALL, "logits_all": True, "policy": "direct", **arguments}
    try:
        llm = Llama(path, weights=weights, **arguments)
    except DoesNotFit as error:
        llm = Llama(path, weights=error.smallest_bytes, **arguments)
    try:
        yield llm
    finally:
        llm.close()
