"""A draft head (EAGLE-3): bit by bit stock llama.cpp's, given what its target would have given it.

It takes a token together with the target's features, so it cannot be evaluated as other models are:
with tokens alone llama.cpp reads features that nobody has written.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.runtime.stock import stock_llama
from tests.models_folder import find_model

SESSION: dict[str, Any] = {"n_ctx": 256, "n_batch": 256, "n_threads": 2, "verbose": False}
LENGTHS = (1, 7, 64)
N_DECODED = 4


def step(llm: Any, tokens: list[int], features: np.ndarray, position: int) -> np.ndarray:
    """The bits of the logits of each token: (n, n_vocab)."""
    n, n_vocab = len(tokens), llm.n_vocab()
    batch = bindings.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        rows = np.ascontiguousarray(features, np.float32)
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert bindings.llama_decode(llm.ctx, batch) == 0
        found = bindings.llama_get_logits(llm.ctx)
        return np.ctypeslib.as_array(found, shape=(n, n_vocab)).copy().view(np.uint32)
    finally:
        batch.embd = None  # it is not llama.cpp's to free
        bindings.llama_batch_free(batch)


def logits(llm: Any, n: int) -> np.ndarray:
    """Those of a prompt, and of tokens that are drafted one at a time after it."""
    rng = np.random.default_rng(n)
    n_embd = llm.n_embd()
    bindings.llama_memory_clear(bindings.llama_get_memory(llm.ctx), True)
    tokens = [int(t) for t in rng.integers(3, llm.n_vocab(), n)]
    seen = [step(llm, tokens, rng.normal(size=(n, n_embd)), 0)]
    for i in range(N_DECODED):
        token = int(seen[-1][-1].view(np.float32).argmax())
        seen.append(step(llm, [token], rng.normal(size=(1, n_embd)), n + i))
    return np.concatenate(seen)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_draft_head_is_that_of_stock_at_every_budget(share: float) -> None:
    path = find_model("tinydense-7M-eagle3-F16.gguf")
    llm = stock_llama(str(path), **SESSION)
    try:
        expected = {n: logits(llm, n) for n in LENGTHS}
        assert all(np.array_equal(logits(llm, n), expected[n]) for n in LENGTHS), "it is defined"
    finally:
        llm.close()
    llm = Llama(path, weights=int(path.stat().st_size * share), policy="direct", **SESSION)
    try:
        for n in LENGTHS:
            assert np.array_equal(logits(llm, n), expected[n]), f"a prompt of {n}"
        assert llm.nexus.stats().bytes_used > 0, "nothing was streamed, so nothing was shown"
    finally:
        llm.close()
