"""A model of the multiplexer is opened as `Llama` opens one: kernels, residuals, hooks of experts.

What they change is seen in statistics, and answers stay those of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.multiplexer.settings import ModelSpec
from nexus_ext.plugins import plugins
from nexus_ext.policies import CacheInfo, IoInfo
from nexus_ext.runtime import popularity
from nexus_ext.runtime.batch import BatchContext, Row, Shape
from nexus_ext.runtime.blueprint import Blueprint, Options, blueprint
from nexus_ext.runtime.elastic import ElasticModel
from nexus_ext.runtime.own_kernels import same_bits
from nexus_ext.runtime.quantize import quantize
from nexus_ext.runtime.residual import make_residuals
from nexus_ext.testing.synthetic import MoeDims, write_moe
from nexus_ext.units import MIB
from tests.integration.alone import Alone
from tests.integration.mux import a_prompt, answer, multiplexer, run

SHAPE = Shape(n_seq=2, n_ctx=256, n_ubatch=64, n_threads=2)
MODELS = Path(__file__).resolve().parents[1] / "models"
TERNARY = MODELS / "bitllama-3M-tq2_0.gguf"


@contextmanager
def opened(plan: Blueprint) -> Iterator[tuple[ElasticModel, BatchContext]]:
    model = ElasticModel(plan)
    context = BatchContext(model.pointer, model.core, SHAPE)
    try:
        yield model, context
    finally:
        context.close()
        model.close()


def decode(context: BatchContext, prompt: list[int], n: int, sequence: int = 0) -> list[np.ndarray]:
    """Logits after a prompt and after each of n - 1 greedy tokens."""
    context.keep(sequence, 0)
    last = len(prompt) - 1
    context.compute([Row(t, i, sequence, i == last) for i, t in enumerate(prompt)])
    found = [context.logits(last).copy()]
    while len(found) < n:
        at = len(prompt) + len(found) - 1
        context.compute([Row(int(found[-1].argmax()), at, sequence, True)])
        found.append(context.logits(0).copy())
    return found


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "moe.gguf"
    write_moe(path, dims=MoeDims(n_experts=16, n_used=2))
    return path


# -- own kernels -----------------------------------------------------------------------------------


def test_our_kernels_compute_with_what_is_resident_and_go_with_it() -> None:
    alone = Alone(TERNARY, SHAPE.n_ctx, SHAPE.n_ubatch)
    prompt = a_prompt(3, 30)
    expected = alone.greedy(prompt, 6)
    alone.close()
    plan = blueprint(TERNARY, SHAPE, Options(kernels="nexus"))
    assert plan.own_kernels == ("tq2_0",) and plan.sizes.packing > 0
    with opened(plan) as (model, context):
        n_units = len(plan.units)
        for n in (0, n_units, 3, 0, n_units - 1, n_units):
            model.set_resident(n)
            packed = model.core.n_packed()
            assert (packed > 0) == (n > 0)
            if n == n_units:
                assert packed == 56 and model.core.attached_bytes() > 0
            held = sum(unit.nbytes for unit in plan.units[:n])
            assert model.core.resident_bytes() <= held
            assert model.core.attached_bytes() <= held
            found = decode(context, prompt, 6)
            if same_bits("tq2_0"):
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), n
        model.set_resident(0)
        assert model.core.attached_bytes() == 0 == model.core.resident_bytes()


def test_sequences_side_by_side_are_the_same_with_our_kernels() -> None:
    with opened(blueprint(TERNARY, SHAPE, Options(kernels="nexus"))) as (model, context):
        model.set_resident(len(model.blueprint.units))
        prompts = [a_prompt(seed, 20) for seed in (4, 5)]
        expected = [decode(context, prompt, 4)[3] for prompt in prompts]
        decoded = [decode(context, prompt, 3, s) for s, prompt in enumerate(prompts)]
        rows = [Row(int(d[-1].argmax()), 22, s, True) for s, d in enumerate(decoded)]
        context.compute(rows)
        for sequence in range(2):
            assert np.array_equal(context.logits(sequence), expected[sequence])


def test_a_failed_read_leaves_no_packed_weight_behind() -> None:
    plan = blueprint(TERNARY, SHAPE, Options(kernels="nexus"))
    with opened(plan) as (model, context):
        last = plan.catalog.tensors[plan.units[2].extents[-1]]
        model.core.inject("eio", last.offset, last.offset + last.nbytes)
        with pytest.raises(Exception, match="reading weights back"):
            model.set_resident(4)
        model.core.clear_faults()
        assert model.resident == 2
        assert model.core.attached_bytes() <= sum(u.nbytes for u in plan.units[:2])
        decode(context, a_prompt(3, 10), 2)
        model.set_resident(0)
        assert model.core.attached_bytes() == 0 == model.core.n_packed()


def test_the_multiplexer_uses_our_kernels() -> None:
    def find(name: str) -> ModelSpec:
        return ModelSpec(name, str(TERNARY))

    async def test() -> None:
        async with multiplexer(64 * MIB, find, kernels="auto", n_ctx=256) as mux:
            tokens, _, _ = await answer(mux, "ternary", a_prompt(3, 30))
            runner = mux._scheduler.entries["ternary"].runner
            assert runner is not None
            assert runner.model.core.n_packed() == (56 if same_bits("tq2_0") else 0)
            assert runner.model.paged.stats(1e9).bytes_loaded > 0
            alone = Alone(TERNARY, 256, 64)
            assert tokens == alone.tokens(a_prompt(3, 30), 8)
            alone.close()

    run(test())


def test_a_typing_mistake_is_named() -> None:
    with pytest.raises(UsageError, match="'nexsu'"):
        blueprint(TERNARY, SHAPE, Options(kernels="nexsu"))
    with pytest.raises(UsageError, match="'fast'"):
        blueprint(TERNARY, SHAPE, Options(policy="fast"))


# -- residuals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model in Q4_0 with a sidecar."""
    source = str(MODELS / "stories260K-f32.gguf")
    target = str(tmp_path_factory.mktemp("rough") / "q4_0.gguf")
    quantize(source, target, "q4_0")
    make_residuals(source, target)
    return target


def test_residuals_correct_what_llama_corrects(rough: str) -> None:
    prompt, share = a_prompt(3, 20), 0.25
    arguments: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 2, "verbose": False}
    llm = Llama(rough, residual=f"{rough}.nxr", residual_share=share, n_gpu_layers=0, **arguments)
    expected = []
    llm.eval(prompt)
    for _ in range(5):
        row = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)).copy()
        expected.append(row)
        llm.eval([int(row.argmax())])
    llm.close()
    plain = blueprint(rough, SHAPE)
    plan = blueprint(rough, SHAPE, Options(residual=f"{rough}.nxr", residual_share=share))
    assert plan.residuals is not None
    assert plan.sizes.total - plain.sizes.total == plan.sizes.residuals
    with opened(plan) as (model, context):
        assert plan.residuals.nbytes <= model.core.attached_bytes() <= plan.sizes.residuals
        assert model.paged.residuals is not None and model.paged.residuals.share == share
        for n in (0, len(plan.units) // 2, len(plan.units)):
            model.set_resident(n)
            found = decode(context, prompt, 5)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), n
    with opened(plain) as (_, context):
        assert not np.array_equal(decode(context, prompt, 5)[1], expected[1])


def test_residuals_of_another_model_are_refused(rough: str) -> None:
    with pytest.raises(UsageError, match="another model"):
        blueprint(TERNARY, SHAPE, Options(residual=f"{rough}.nxr"))


def test_residuals_are_a_part_of_the_budget(rough: str) -> None:
    async def test() -> None:
        plan = blueprint(rough, Shape(4, 512, 64, 2))
        room = plan.sizes.total + plan.vocabulary_bytes
        for residual, fits in ((None, True), (f"{rough}.nxr", False)):
            spec = ModelSpec("m", rough, residual=residual)
            async with multiplexer(room, lambda _, spec=spec: spec, session_ram_bytes=0) as mux:
                if fits:
                    await answer(mux, "m", a_prompt(1, 5))
                else:
                    with pytest.raises(DoesNotFit):
                        await answer(mux, "m", a_prompt(1, 5))

    run(test())


# -- hooks -----------------------------------------------------------------------------------------


def test_the_hooks_of_experts_decide(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CacheInfo] = []

    def choose_cache(info: CacheInfo, use: Callable[[str, str], None]) -> None:
        asked.append(info)
        use("lru", "")

    chosen: list[str] = []
    monkeypatch.setattr(plugins(), "choose_cache", choose_cache)
    monkeypatch.setattr(plugins(), "choose_predictor", lambda info, use: use("gate", ""))
    monkeypatch.setattr(
        "nexus_ext.core.Model.set_cache_policy", lambda _, name, plugin: chosen.append(name)
    )
    plan = blueprint(moe, SHAPE)
    alone = Alone(moe, SHAPE.n_ctx, SHAPE.n_ubatch)
    prompt = [token % 300 for token in a_prompt(3, 20)]
    expected = alone.greedy(prompt, 8)
    alone.close()
    with opened(plan) as (model, context):
        layers = tuple(range(len(plan.caches)))
        expected_info = CacheInfo(len(layers), 16, 2, 16, plan.catalog.fingerprint, layers)
        assert asked == [expected_info] and chosen == ["lru"]
        for n in (len(plan.units) - 10, 0, plan.n_dense + 3):  # six slots, none, three
            model.set_resident(n)
            found = decode(context, prompt, 8)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), n
        stats = model.paged.stats(1e9)
        assert stats.predicting and stats.prefetched_bytes > 0
        assert stats.expert_hit_rate is not None


def test_the_hook_of_reading_decides(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[IoInfo] = []

    def choose(info: IoInfo) -> str:
        asked.append(info)
        return "buffered"

    assert blueprint(moe, SHAPE).io_mode == "direct", "what streams is beyond the budget"
    monkeypatch.setattr(plugins(), "choose_io", choose)
    plan = blueprint(moe, SHAPE, Options(budget_bytes=5))
    assert [(i.streamed_bytes, i.resident_bytes, i.limit_bytes) for i in asked] == [
        (plan.units_bytes, 5, 5)
    ]
    with opened(plan) as (model, _):
        assert model.paged.stats(1e9).io_mode == "buffered"
    assert blueprint(moe, SHAPE, Options(policy="direct")).io_mode == "direct"


def test_what_experts_were_used_is_remembered(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(popularity, "default_cache_dir", lambda *_: str(tmp_path))
    plan = blueprint(moe, SHAPE, Options(warm_start=True))
    for session in range(2):
        with opened(plan) as (model, context):
            model.set_resident(len(plan.units) - 10)
            model.warm()
            assert model.paged.warm_start is not None
            model.paged.warm_start.wait()
            assert (model.paged.stats(1e9).preloaded_bytes > 0) == (session > 0)
            decode(context, list(range(20)), 4)
    with opened(blueprint(moe, SHAPE, Options(warm_start=False))) as (model, _):
        model.warm()
        assert model.paged.warm_start is None
