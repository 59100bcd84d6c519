"""Experts that are predicted and read ahead change no bit, and the gates are computed correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import core
from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.integration.streaming import logits, prompt, stock
from tests.integration.test_experts import (
    LENGTHS,
    N_DECODE,
    TINY,
    assert_equal,
    cached,
    core_model,
    decode_in_turn,
    reference,
    tensors_of,
)
from tests.models_folder import find_model

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"arch": "llama"},
    "qwen2moe": {"arch": "qwen2moe"},
    "qwen3moe": {"arch": "qwen3moe"},
    "deepseek2, fused": {"arch": "deepseek2", "fused": True},
    "gpt-oss": {"arch": "gpt-oss", "quant": "Q8_0", "expert_quant": "MXFP4"},
    "olmoe": {"arch": "olmoe"},
    "granitemoe": {"arch": "granitemoe"},
    "qwen3next": {"arch": "qwen3next"},
    "qwen35moe, fused": {"arch": "qwen35moe", "fused": True},
    "top-all": {"arch": "qwen3moe", "dims": MoeDims(n_experts=4, n_used=4)},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_stock_whatever_is_predicted(name: str, tmp_path: Path) -> None:
    """Small caches, every predictor, victims at random; the gates of every architecture are found.

    The control, a gate computed again on what it was computed on, must pick what the router picked.
    """
    path = tmp_path / "model.gguf"
    write_moe(path, **CASES[name])
    expected = reference(path)
    dims = CASES[name].get("dims", MoeDims())
    with cached(path, min(dims.n_used + 2, dims.n_experts)) as llm:
        model = core_model(llm)
        for predictor in ("gate", "previous", "popular", "auto", "none"):
            for policy in ("adaptive", "random"):
                model.set_predictor(predictor)
                model.set_cache_policy(policy)
                assert_equal(llm, expected, f"{predictor}, {policy}")
        stats = model.stats()
        if dims.n_used + 2 < dims.n_experts:
            assert stats.prefetched > 0
            assert 0 < stats.prefetch_used <= stats.prefetched
        found = recorded(llm, prompt(40, llm.n_vocab()))
    assert found["control"].keys() == found["router"].keys()
    for layer, decisions in found["router"].items():
        assert same_sets(found["control"][layer], decisions) == 1.0, f"tensor {layer}"
    # All but the first layer are predicted; llama.cpp may compute the last for one token alone.
    assert len(found["gate"]) >= len(found["router"]) - 2 + (len(found["router"]) < 3)


def recorded(llm: Any, tokens: list[int]) -> dict[str, dict[int, list[list[int]]]]:
    """What routers decided for a prompt, and what was predicted: by kind, by tensor, by token."""
    kinds = {0: "router", core.GATE_ROUTED: "gate", core.CONTROL_ROUTED: "control"}
    found: dict[str, dict[int, list[list[int]]]] = {kind: {} for kind in kinds.values()}
    model = core_model(llm)
    model.take_routing()
    model.record_routing(True, predictions=True)
    logits(llm, tokens, 3)
    model.record_routing(False)
    while entries := model.take_routing():
        for number, decisions in entries:
            kind = kinds[number & (core.GATE_ROUTED | core.CONTROL_ROUTED)]
            tensor = number & (core.GATE_ROUTED - 1)
            found[kind].setdefault(tensor, []).extend(decisions)
    return found


def same_sets(a: list[list[int]], b: list[list[int]]) -> float:
    return float(np.mean([set(x) == set(y) for x, y in zip(a, b, strict=True)]))


def test_two_contexts_in_turn_with_prediction(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path)
    sequences = [prompt(20, 320, seed) for seed in (1, 2)]
    with stock(path, **TINY) as llm:
        expected = decode_in_turn(llm, sequences)
    with cached(path, 3) as llm:
        model = core_model(llm)
        model.set_predictor("gate")
        for policy in ("adaptive", "random"):
            model.set_cache_policy(policy)
            got = decode_in_turn(llm, sequences)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        assert model.stats().prefetch_used > 0


@pytest.mark.parametrize("engine", ["threads", "uring"])
def test_the_trained_model_is_predicted_well_beyond_chance(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_IO_ENGINE", engine)
    path = find_model("tinymoe-41M-Q4_K_M.gguf")
    expected = reference(path)
    with cached(path, 8) as llm:
        model = core_model(llm)
        model.set_predictor("gate")
        assert_equal(llm, expected, "gate")
        found = recorded(llm, prompt(60, llm.n_vocab()))
        stats = model.stats()
        assert stats.prefetch_used > stats.prefetch_wasted > 0
    for layer, predictions in list(found["gate"].items())[1:]:
        pairs = zip(predictions, found["router"][layer], strict=True)
        overlap = np.mean([len(set(x) & set(y)) / len(y) for x, y in pairs])
        assert overlap > 0.35, f"tensor {layer}: chance is 0.125"


def test_a_prefill_reads_ahead_into_empty_slots_and_each_expert_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    dims = MoeDims(n_experts=16, n_used=2)
    write_moe(path, dims=dims)
    tokens = prompt(64, dims.n_vocab)
    read = {}
    for predictor in ("none", "auto"):
        with cached(path, 12) as llm:
            model = core_model(llm)
            model.set_predictor(predictor)
            logits(llm, tokens, 0)
            stats = model.stats()
            read[predictor] = stats.bytes_read
            assert (stats.prefetched > 0) == (predictor == "auto")
            if predictor == "auto":
                assert stats.prefetch_used > 0.8 * stats.prefetched
    assert read["auto"] <= read["none"] * 1.05, "what is read ahead is not read again"


@pytest.mark.parametrize("part", ["gate", "down"])
def test_a_prediction_that_cannot_be_read_fails_only_where_it_is_used(
    part: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path)
    expected = reference(path)
    bad = next(t for t in tensors_of(path) if t.name == f"blk.1.ffn_{part}_exps.weight")
    with cached(path, 3) as llm:
        model = core_model(llm)
        model.set_predictor("gate")
        for _ in range(2):
            model.inject("eio", begin=bad.offset, end=bad.offset + bad.nbytes)
            for n in LENGTHS:
                with pytest.raises(ReadFailed, match=bad.name):
                    logits(llm, prompt(n, llm.n_vocab()), N_DECODE)
            model.clear_faults()
            assert_equal(llm, expected, "after the failure")
        model.inject("eio", count=3)
        assert_equal(llm, expected, "failures that heal")


def test_a_predictor_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path)
    with cached(path, 3) as llm, pytest.raises(FormatError, match="crystal"):
        core_model(llm).set_predictor("crystal ball")
