"""Streamed output equals stock llama.cpp's, bit by bit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from nexus_ext.testing.synthetic import write_llama, write_moe
from tests.integration.streaming import Bits, logits, paged, prompt, stock
from tests.models_folder import find_model

MODELS = [
    "stories260K-f32.gguf",
    "stories260K-q4_0.gguf",
    "stories260K-q8_0.gguf",
    "bitllama-3M-f16.gguf",
    "bitllama-3M-q4_k_m.gguf",
    "bitllama-3M-q8_0.gguf",
    "bitllama-3M-tq1_0.gguf",
    "bitllama-3M-tq2_0.gguf",
    "tinydense-7M-F16.gguf",
    "tinydense-7M-Q4_K_M.gguf",
    "tinymoe-41M-F16.gguf",
    "tinymoe-41M-Q4_K_M.gguf",
]
SHARES = (0.3, 0.6, 0.9)


def assert_identical(path: Path, lengths: tuple[int, ...], n_ctx: int = 704) -> None:
    with stock(path, n_ctx=n_ctx) as llm:
        vocabulary = llm.n_vocab()
        expected = {n: logits(llm, prompt(n, vocabulary)) for n in lengths}
    streamed = 0
    for share in SHARES:
        with paged(path, int(path.stat().st_size * share), n_ctx=n_ctx) as llm:
            for n in lengths:
                got = logits(llm, prompt(n, vocabulary))
                assert np.array_equal(got, expected[n]), f"{path.name} at {share}, prompt of {n}"
            if llm.nexus.active:
                streamed += llm.nexus.stats().bytes_used
    assert streamed > 0, "nothing was streamed, so nothing was shown"


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_stock_at_every_budget_and_prompt_length(name: str) -> None:
    assert_identical(find_model(name), (1, 7, 64, 600))


@pytest.mark.parametrize(
    "quant", ["Q4_0", "Q4_1", "Q5_0", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS", "BF16"]
)
def test_logits_equal_stock_for_other_quantizations(quant: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(
        path, n_layers=3, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=600, quant=quant
    )
    assert_identical(path, (1, 64))


def test_logits_equal_stock_for_rows_that_no_power_of_two_divides(tmp_path: Path) -> None:
    """Slabs of 1, 2 or 3 rows (mod 4) take the paths in the kernels that whole matrices take."""
    for n_vocab in (601, 602, 603, 604):
        path = tmp_path / f"{n_vocab}.gguf"
        write_llama(
            path,
            n_layers=2,
            n_embd=256,
            n_ff=512,
            n_heads=4,
            n_heads_kv=2,
            n_vocab=n_vocab,
            quant="F16",
        )
        assert_identical(path, (1, 33))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [None, 3])
def test_logits_equal_stock_for_split_and_tied_files(
    tied: bool, split: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_llama(
        path, n_layers=4, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=512, quant="Q4_K",
        tied=tied, split=split,
    )  # fmt: skip
    first = path if split is None else next(iter(sorted(tmp_path.glob("*-00001-of-*.gguf"))))
    assert_identical(first, (1, 40))


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe", "gpt-oss", "deepseek2"])
def test_logits_equal_stock_for_mixtures_of_experts(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path, arch=arch)
    assert_identical(path, (1, 40))


def test_flash_attention_changes_nothing() -> None:
    path = find_model("tinydense-7M-Q4_K_M.gguf")
    with stock(path, flash_attn=True) as llm:
        expected = logits(llm, prompt(64, llm.n_vocab()))
    with paged(path, "2M", flash_attn=True) as llm:
        assert np.array_equal(logits(llm, prompt(64, llm.n_vocab())), expected)


def test_two_models_decode_in_turn_and_at_once() -> None:
    names = ("bitllama-3M-q4_k_m.gguf", "tinydense-7M-Q4_K_M.gguf")
    paths = [find_model(name) for name in names]
    expected: list[Bits] = []
    for path in paths:
        with stock(path) as llm:
            expected.append(logits(llm, prompt(50, llm.n_vocab())))
    with paged(paths[0], "700K") as a, paged(paths[1], "1500K") as b:
        for _ in range(2):
            for llm, bits in zip((a, b), expected, strict=True):
                assert np.array_equal(logits(llm, prompt(50, llm.n_vocab())), bits)
        results: dict[int, Bits] = {}

        def run(i: int, llm: object) -> None:
            results[i] = logits(llm, prompt(50, llm.n_vocab()))  # type: ignore[attr-defined]

        threads = [threading.Thread(target=run, args=(i, llm)) for i, llm in enumerate((a, b))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(results[i], expected[i]) for i in range(2))


def test_a_stock_model_beside_a_paged_one_is_left_alone() -> None:
    path = find_model("bitllama-3M-q4_k_m.gguf")
    with stock(path) as before:
        expected = logits(before, prompt(20, before.n_vocab()))
    with paged(path, "700K") as llm, stock(path) as beside:
        assert np.array_equal(logits(beside, prompt(20, beside.n_vocab())), expected)
        assert np.array_equal(logits(llm, prompt(20, llm.n_vocab())), expected)
