"""Experts through the cache: bit by bit those of stock llama.cpp, whatever is cached or evicted."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest
from llama_cpp._internals import LlamaBatch, LlamaContext

from nexus_ext import Llama
from nexus_ext.errors import ReadFailed
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.runtime.planning import plan_model
from nexus_ext.testing import expert_plan
from nexus_ext.testing.synthetic import MoeDims, write_moe
from nexus_ext.types import Role
from tests.integration.streaming import Bits, logits, prompt, stock
from tests.models_folder import find_model

TINY: dict[str, Any] = {
    "n_ctx": 128,
    "n_batch": 128,
    "n_ubatch": 64,
    "n_threads": 1,
    "verbose": False,
}
POLICIES = ("adaptive", "lfru", "lru", "lfu", "least-stale", "random")
LENGTHS = (1, 40)  # a batch of one, and a prefill that needs more experts than there are slots
N_DECODE = 10

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"arch": "llama"},
    "qwen2moe": {"arch": "qwen2moe"},
    "qwen3moe": {"arch": "qwen3moe"},
    "deepseek2": {"arch": "deepseek2"},
    "deepseek2, fused": {"arch": "deepseek2", "fused": True},
    "gpt-oss, MXFP4": {"arch": "gpt-oss", "quant": "Q8_0", "expert_quant": "MXFP4"},
    "olmoe": {"arch": "olmoe"},
    "granitemoe": {"arch": "granitemoe"},
    "qwen3next": {"arch": "qwen3next"},
    "qwen3next, fused": {"arch": "qwen3next", "fused": True},
    "qwen35moe": {"arch": "qwen35moe"},
    "F16, split": {"arch": "qwen3moe", "quant": "F16", "split": 2},
    "Q4_K": {"arch": "qwen3moe", "quant": "Q4_K", "dims": MoeDims(n_embd=256, n_ff=256)},
    "Q4_0": {"arch": "gpt-oss", "expert_quant": "Q4_0", "dims": MoeDims(n_ff=96)},
    "Q8_0": {"arch": "qwen3moe", "expert_quant": "Q8_0", "dims": MoeDims(n_ff=96)},
    "IQ4_NL": {"arch": "qwen2moe", "expert_quant": "IQ4_NL", "dims": MoeDims(n_ff=128)},
    "top-1": {"arch": "qwen3moe", "dims": MoeDims(n_used=1)},
    "top-all": {"arch": "qwen3moe", "dims": MoeDims(n_experts=4, n_used=4)},
    "two experts": {"arch": "qwen2moe", "dims": MoeDims(n_experts=2, n_used=1)},
    "512 experts": {
        "arch": "qwen3moe",
        "dims": MoeDims(
            n_layers=2, n_embd=64, n_ff=32, n_heads=2, n_heads_kv=1, n_experts=512, n_used=10
        ),
    },
}


@contextmanager
def cached(
    path: Path, slots: int, *, wave: int = 4, io_mode: str = "direct", **arguments: Any
) -> Iterator[Llama]:
    plan = expert_plan(path, slots, wave=wave, io_mode=io_mode)
    assert Plan.from_json(plan.to_json()) == plan, "a plan that the solver could have made"
    arguments = {"logits_all": True, "warm_start": False, **arguments}
    llm = Llama(path, plan=plan, **{**TINY, **arguments})
    try:
        yield llm
    finally:
        llm.close()


def core_model(llm: Llama) -> Any:
    model = llm.nexus.model
    assert model is not None
    return model


def reference(path: Path, **arguments: Any) -> dict[int, Bits]:
    with stock(path, **{**TINY, **arguments}) as llm:
        return {n: logits(llm, prompt(n, llm.n_vocab()), N_DECODE) for n in LENGTHS}


def assert_equal(llm: Llama, expected: dict[int, Bits], what: str) -> None:
    for n, bits in expected.items():
        got = logits(llm, prompt(n, llm.n_vocab()), N_DECODE)
        assert np.array_equal(got, bits), f"{what}, prompt of {n}"


def first_file(path: Path) -> Path:
    return path if path.exists() else next(iter(sorted(path.parent.glob("*-00001-of-*.gguf"))))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_stock_at_every_cache_size_under_every_policy(
    name: str, tmp_path: Path
) -> None:
    options = CASES[name]
    write_moe(tmp_path / "model.gguf", **options)
    path = first_file(tmp_path / "model.gguf")
    expected = reference(path)
    dims = options.get("dims", MoeDims())
    sizes = sorted(
        {dims.n_used, min(dims.n_used + 1, dims.n_experts), dims.n_experts // 2, dims.n_experts}
    )
    for slots in sizes:
        if slots < dims.n_used:
            continue
        with cached(path, slots) as llm:
            model = core_model(llm)
            for policy in POLICIES:
                model.set_cache_policy(policy)
                assert_equal(llm, expected, f"{slots} slots, {policy}")
            stats = model.stats()
            assert llm.nexus.stats().expert_hit_rate is not None
            assert stats.expert_misses > 0
            assert stats.expert_uses > stats.expert_misses, f"{slots} slots: nothing was served"
            if slots == dims.n_experts:
                assert stats.expert_evictions == 0
                model.set_predictor("none")  # it may read ahead what no token has used yet
                llm.nexus.reset_stats()
                assert_equal(llm, expected, "all cached")
                assert llm.nexus.stats().expert_hit_rate == 1.0
                assert model.stats().bytes_read == 0, "what is cached is not read"


@pytest.mark.parametrize("wave", [1, 2, 3, 16])
def test_logits_equal_stock_in_waves_of_every_size(wave: int, tmp_path: Path) -> None:
    """Without a cache, and with one that serves some experts of a batch while others pass by."""
    path = tmp_path / "model.gguf"
    write_moe(path, dims=MoeDims(n_experts=16, n_used=3))
    expected = reference(path)
    for slots in (0, 3, 9):
        with cached(path, slots, wave=wave) as llm:
            for _ in range(2):
                assert_equal(llm, expected, f"{slots} slots, waves of {wave}")
            assert (llm.nexus.stats().expert_hit_rate is not None) == (slots > 0)


def test_a_batch_that_exceeds_the_cache_is_served_from_it_as_far_as_it_goes(tmp_path: Path) -> None:
    """Each expert is read at most once a micro-batch, and what is cached not at all."""
    path = tmp_path / "model.gguf"
    dims = MoeDims(n_experts=16, n_used=2)
    write_moe(path, dims=dims)
    tokens = prompt(64, dims.n_vocab)
    read = {}
    for slots in (0, 12):
        with cached(path, slots) as llm:
            model = core_model(llm)
            logits(llm, tokens, 0)
            model.reset_stats()
            logits(llm, tokens, 0)
            stats = model.stats()
            read[slots] = stats.bytes_read
            if slots:
                assert stats.expert_evictions == 0
                assert stats.expert_uses > slots * dims.n_layers, "some experts pass by"
                assert 0 < stats.expert_misses <= (dims.n_experts - slots) * dims.n_layers
    experts = sum(t.nbytes for t in tensors_of(path) if t.role is Role.EXPERT)
    assert read[0] < experts * 1.6, "once, alignment included"
    assert read[12] < read[0] * 0.3


@pytest.mark.parametrize("slots", [0, 2])
def test_experts_that_are_whole_pages_land_without_a_copy(slots: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path, quant="Q4_K", dims=MoeDims(n_embd=256, n_ff=256), alignment=32)
    assert {t.nbytes // t.n_experts % 4096 for t in tensors_of(path) if t.n_experts} == {0}
    with cached(path, slots) as llm:
        if not core_model(llm).file_io().direct:
            pytest.skip("this file system takes no direct reads")
        llm.nexus.reset_stats()
        logits(llm, prompt(40, llm.n_vocab()), 2)
        stats = core_model(llm).stats()
        assert stats.bytes_read > 0 and stats.bounces == 0


def tensors_of(path: Path) -> Any:
    return plan_model(path, PlanRequest(weights_bytes=1 << 30, gpu_bytes=0)).catalog.tensors


@pytest.mark.parametrize("engine", ["threads", "uring"])
@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_every_way_of_reading_gives_the_same_bits(
    engine: str, io_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_IO_ENGINE", engine)
    path = tmp_path / "model.gguf"
    write_moe(path, arch="gpt-oss", quant="Q8_0", expert_quant="MXFP4")
    expected = reference(path)
    with cached(path, 3, io_mode=io_mode) as llm:
        assert_equal(llm, expected, f"{engine}, {io_mode}")
        assert llm.nexus.stats().io_engine == {"uring": "io_uring"}.get(engine, engine)


def test_the_trained_mixture_of_experts_equals_stock() -> None:
    path = find_model("tinymoe-41M-Q4_K_M.gguf")
    expected = reference(path)
    shape = plan_model(path, PlanRequest(weights_bytes=1 << 30, gpu_bytes=0)).catalog.shape
    for slots in sorted({shape.n_experts_used, shape.n_experts // 2, shape.n_experts}):
        with cached(path, slots) as llm:
            for policy in ("adaptive", "random"):
                core_model(llm).set_cache_policy(policy)
                assert_equal(llm, expected, f"{slots} slots, {policy}")
            assert (llm.nexus.stats().expert_hit_rate or 0) > 0.2


# -- two contexts ---------------------------------------------------------------------------------


def decode_in_turn(llm: Any, sequences: list[list[int]]) -> list[Bits]:
    """Each sequence in a context of its own of one model, token by token in turn."""
    contexts = [
        LlamaContext(model=llm._model, params=llm.context_params, verbose=False) for _ in sequences
    ]
    batch = LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)
    n_vocab = llm.n_vocab()
    rows: list[list[Any]] = [[] for _ in sequences]
    try:
        for at in range(len(sequences[0])):
            for context, tokens, out in zip(contexts, sequences, rows, strict=True):
                batch.set_batch([tokens[at]], n_past=at, logits_all=True)
                context.decode(batch)
                pointer = bindings.llama_get_logits_ith(context.ctx, -1)
                out.append(np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy())
    finally:
        batch.close()
        for context in contexts:
            context.close()
    return [np.array(row, dtype=np.float32).view(np.uint32) for row in rows]


@pytest.mark.parametrize("arch", ["qwen3moe", "qwen3next"])
def test_two_contexts_of_one_model_decode_in_turn(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path, arch=arch)
    sequences = [prompt(20, 320, seed) for seed in (1, 2)]
    with stock(path, **TINY) as llm:
        expected = decode_in_turn(llm, sequences)
    assert not np.array_equal(expected[0], expected[1])
    for slots in (2, 4):
        with cached(path, slots) as llm:
            for policy in ("adaptive", "random"):
                core_model(llm).set_cache_policy(policy)
                got = decode_in_turn(llm, sequences)
                assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
            assert core_model(llm).stats().expert_evictions > 0


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Bits]]:
    path = tmp_path_factory.mktemp("experts") / "model.gguf"
    write_moe(path)
    return path, reference(path)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("kind", ["eio", "short"])
def test_experts_that_fail_for_a_moment_change_nothing(
    kind: str, slots: int, small: tuple[Path, dict[int, Bits]]
) -> None:
    path, expected = small
    with cached(path, slots) as llm:
        model = core_model(llm)
        model.inject(kind, count=3)
        assert_equal(llm, expected, kind)
        stats = model.stats()
        assert (stats.retries if kind == "eio" else stats.short_reads) == 3


@pytest.mark.parametrize("slots", [0, 2, 5])
@pytest.mark.parametrize("part", ["gate", "down"])
def test_an_expert_that_fails_for_good_is_named_and_the_next_call_is_right(
    part: str, slots: int, small: tuple[Path, dict[int, Bits]]
) -> None:
    path, expected = small
    bad = next(t for t in tensors_of(path) if t.name == f"blk.1.ffn_{part}_exps.weight")
    with cached(path, slots) as llm:
        model = core_model(llm)
        for _ in range(2):
            model.inject("eio", begin=bad.offset, end=bad.offset + bad.nbytes)
            for n in LENGTHS:
                with pytest.raises(ReadFailed) as failure:
                    logits(llm, prompt(n, llm.n_vocab()), N_DECODE)
                assert failure.value.path == str(path)
                assert failure.value.errno == 5
                assert bad.name in str(failure.value)
                assert bad.offset - 4096 <= failure.value.offset < bad.offset + bad.nbytes
            model.clear_faults()
        for _ in range(2):
            assert_equal(llm, expected, "after the failure")


# Python's own KeyboardInterrupt may come while llama.cpp logs; a callback cannot raise it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("slots", [0, 3])
def test_ctrl_c_while_experts_stream_and_the_next_call_is_right(
    slots: int, small: tuple[Path, dict[int, Bits]]
) -> None:
    path, expected = small
    main = threading.main_thread().ident
    assert main is not None
    with cached(path, slots) as llm:
        model = core_model(llm)
        tokens = prompt(100, llm.n_vocab())
        for moment in (1, 2, 5, 8):
            before = model.stats().segments

            def interrupt(until: int = before + moment) -> None:
                while model.stats().segments < until:
                    pass
                signal.pthread_kill(main, signal.SIGINT)

            watcher = threading.Thread(target=interrupt)
            watcher.start()
            with pytest.raises(KeyboardInterrupt):
                for _ in range(1000):
                    llm.reset()
                    llm.eval(tokens)
            watcher.join()
            assert_equal(llm, expected, f"after an interruption at {moment}")


def test_nothing_leaks_over_ten_thousand_tokens(tmp_path: Path) -> None:
    """With as many slots as a token uses, one that stayed in use would stop the next token."""

    def footprint() -> tuple[int, int]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    path = tmp_path / "model.gguf"
    dims = MoeDims(n_layers=1, n_embd=64, n_ff=32, n_heads=2, n_heads_kv=1)
    write_moe(path, dims=dims, quant="Q8_0")
    with cached(path, dims.n_used, io_mode="buffered", logits_all=False) as llm:
        model = core_model(llm)
        rng = np.random.default_rng(0)
        sizes = []
        for _ in range(100):
            llm.reset()
            for token in rng.integers(3, dims.n_vocab, 100):
                llm.eval([int(token)])
            sizes.append(footprint())
        stats = model.stats()
        assert stats.expert_uses == 10_000 * dims.n_used
        assert stats.expert_evictions > 1000
        assert sizes[-1][1] == sizes[10][1]
        assert sizes[-1][0] - sizes[10][0] < 1 << 20
