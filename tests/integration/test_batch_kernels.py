"""Products with many columns through kernels of our own: bit by bit what stock llama.cpp gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nexus_ext.runtime import backend
from nexus_ext.runtime.batch import Row
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe
from tests.integration.alone import Alone
from tests.integration.streaming import logits, paged, prompt, stock
from tests.integration.test_batch import Opened, prefill
from tests.integration.test_experts import cached
from tests.same_bits import needs_same_bits

ROOT = Path(__file__).resolve().parents[2]
DIMS = MoeDims(n_ff=128, n_experts=16, n_used=3)
KINDS = {"q4_0", "q8_0", "iq4_nl", "mxfp4", "q4_K", "q6_K"}


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    backend.register()
    needs_same_bits(set(backend.batch_kernels()) >= KINDS, "a product of many columns")


def products_of(llm: object, tokens: list[int], n_decode: int = 2) -> tuple[np.ndarray, int]:
    before = backend.n_batch_products()
    return logits(llm, tokens, n_decode), backend.n_batch_products() - before


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize("slots", [0, 5, 16])
def test_prompts_and_tokens_take_them(kind: str, slots: int, tmp_path: Path) -> None:
    """In waves, with some records in the cache, and with all of them."""
    path = tmp_path / "model.gguf"
    write_moe(path, dims=DIMS, arch="gpt-oss", expert_quant=kind)
    options = {"n_threads": 2, "n_ubatch": 64}
    tokens = {n: prompt(n, DIMS.n_vocab, seed=n) for n in (1, 5, 11, 50)}
    with stock(path, **options) as llm:
        expected = {n: logits(llm, tokens[n], 2) for n in tokens}
    with cached(path, slots) as llm:
        for n in tokens:
            for _ in range(2):
                seen, n_products = products_of(llm, tokens[n])
                assert np.array_equal(seen, expected[n]), f"{kind}, {slots} slots, {n} tokens"
                assert n_products > 0 or n in (5, 11), "some tokens an expert: not worth it"


@pytest.mark.parametrize("n_threads", [1, 3])
def test_waves_of_every_size_leave_the_rows_of_others_alone(n_threads: int, tmp_path: Path) -> None:
    """Each computes some rows of a batch in place."""
    path = tmp_path / "model.gguf"
    write_moe(path, dims=DIMS, arch="gpt-oss", expert_quant="Q4_0")
    options = {"n_threads": n_threads, "n_threads_batch": n_threads, "n_ubatch": 64}
    tokens = prompt(60, DIMS.n_vocab)
    with stock(path, **options) as llm:
        expected = logits(llm, tokens, 2)
    for wave in (1, 2, 5):
        for slots in (0, 3, 9):
            with cached(path, slots, wave=wave, **options) as llm:
                for _ in range(2):
                    seen, n_products = products_of(llm, tokens)
                    assert np.array_equal(seen, expected), f"{slots} slots, waves of {wave}"
                    assert n_products > 3 * DIMS.n_layers, "several waves a product"


def test_what_is_pinned_is_computed_by_them_within_its_segment(tmp_path: Path) -> None:
    """Gate and up share what was rounded and packed; nothing of the experts is streamed."""
    from nexus_ext import Llama

    path = tmp_path / "model.gguf"
    write_moe(path, dims=DIMS, expert_quant="Q4_0")
    tokens = prompt(50, DIMS.n_vocab)
    with stock(path) as llm:
        expected = logits(llm, tokens, 0)
    pins = [("attn_output.weight", "nvme"), ("exps", "ram")]
    llm = Llama(
        path, pins=pins, n_ctx=704, n_batch=704, n_ubatch=256, logits_all=True, verbose=False
    )
    try:
        before = backend.n_batch_products()
        assert np.array_equal(logits(llm, tokens, 0), expected)
        assert backend.n_batch_products() - before == 3 * DIMS.n_layers
    finally:
        llm.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_sequences_that_are_decoded_together_take_them(kind: str, tmp_path: Path) -> None:
    """A pass over the weights, streamed or not, for four of them; each as if it were alone."""
    path = tmp_path / "model.gguf"
    write_llama(
        path, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=330, quant=kind
    )
    alone = Alone(path)
    texts = [prompt(9 + s, alone.n_vocab, seed=s) for s in range(4)]
    expected = [alone.greedy(text, 6) for text in texts]
    alone.close()
    opened = Opened(path)
    context, n_units = opened.context, len(opened.plan.units)
    rows = [prefill(context, s, text, 64) for s, text in enumerate(texts)]
    for step in range(6):
        for s, row in enumerate(rows):
            assert np.array_equal(row, expected[s][step]), (kind, s, step)
        opened.model.set_resident((0, n_units, n_units // 2)[step % 3])
        before = backend.n_batch_products()
        context.compute(
            [Row(int(row.argmax()), len(texts[s]) + step, s, True) for s, row in enumerate(rows)]
        )
        assert backend.n_batch_products() > before
        rows = [context.logits(s).copy() for s in range(4)]
    opened.close()


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_a_token_alone_is_what_the_delegate_computes(kind: str, tmp_path: Path) -> None:
    """Resident and streamed matrices, rows of any number, more threads than there is work for."""
    path = tmp_path / "model.gguf"
    write_llama(
        path, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=330, quant=kind
    )
    tokens = prompt(3, 330)
    with stock(path) as llm:
        expected = logits(llm, tokens, 4)
    for n_threads in (1, 2, 7):
        with paged(
            path, "1G", pins=[("blk.0.ffn_(up|down).weight", "nvme")], n_threads=n_threads
        ) as llm:
            seen, n_products = products_of(llm, tokens, 4)
            assert np.array_equal(seen, expected), (kind, n_threads)
            assert n_products >= 4 * 2 * 7, "every matrix of every token that is decoded"


@pytest.mark.parametrize("variable", ["NEXUS_BATCH_KERNELS=0", "GGML_CPU_TILED_MM_FORCE=1"])
def test_they_stay_away_where_ggml_shall_compute_by_itself(variable: str, tmp_path: Path) -> None:
    """As the user says, or since ggml sums otherwise when it is told to use tiles."""
    path = tmp_path / "model.gguf"
    write_llama(
        path, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=330, quant="Q4_K"
    )
    code = f"""
from pathlib import Path
import numpy as np
from nexus_ext.runtime import backend
from tests.integration.streaming import logits, paged, prompt, stock
path = Path({str(path)!r})
with stock(path) as llm:
    expected = logits(llm, prompt(3, 330), 3)
with paged(path, "1G", pins=[("blk.0.ffn_(up|down).weight", "nvme")]) as llm:
    assert np.array_equal(logits(llm, prompt(3, 330), 3), expected)
print(backend.batch_kernels(), backend.n_batch_products())
"""
    name, value = variable.split("=")
    done = subprocess.run(
        # Appended: the checkout's nexus_ext must not hide the installed one.
        [sys.executable, "-c", f"import sys\nsys.path.append({str(ROOT)!r})\n{code}"],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "() 0"
