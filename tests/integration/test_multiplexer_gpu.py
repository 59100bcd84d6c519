"""Budgets of GPUs: who counts against which, and who goes for whom.

The machines that run these tests have no GPU: llama.cpp then keeps the layers in main memory, and
what is tested is the accounting and the eviction, not the computing on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.multiplexer.settings import GpuBudget, ModelSpec
from nexus_ext.runtime import ggml
from nexus_ext.runtime.blueprint import Options, blueprint
from nexus_ext.server import load_config
from nexus_ext.server.engine import gpu_budgets
from nexus_ext.units import MIB
from tests.integration.alone import Alone
from tests.integration.mux import N_CTX, N_UBATCH, PATHS, a_prompt, answer, multiplexer, run, shape

NOTHING = {"XDG_CONFIG_HOME": "/nowhere"}


def on_gpu(name: str, layers: int | None = None) -> int:
    options = Options(gpu_layers=layers, gpu_budget_bytes=1 << 40)
    return blueprint(PATHS[name], shape(), options).gpu.total_bytes


@pytest.mark.parametrize("name", list(PATHS))
def test_what_is_on_a_gpu_is_nowhere_else(name: str) -> None:
    nothing = blueprint(PATHS[name], shape())
    everything = on_gpu(name)
    before = 0
    for layers in range(1, nothing.catalog.shape.n_layers + 2):
        plan = blueprint(PATHS[name], shape(), Options(gpu_layers=layers))
        assert before < plan.gpu.total_bytes <= everything
        before = plan.gpu.total_bytes
        there = {t.name for i in plan.units for t in (plan.catalog.tensors[n] for n in i.extents)}
        assert not there & plan.gpu.names
        assert plan.sizes.kv + plan.gpu.kv_bytes == nothing.sizes.kv
        here, all_of_it = (p.units_bytes + p.sizes.permanent for p in (plan, nothing))
        assert here < all_of_it
        # As many layers as fit, and no more:
        room = plan.gpu.total_bytes
        for more, found in ((0, layers), (-1, layers - 1)):
            chosen = blueprint(PATHS[name], shape(), Options(gpu_budget_bytes=room + more))
            assert chosen.gpu.n_layers == found


def test_models_share_the_budget_of_a_gpu() -> None:
    """Main memory has room for all; the GPU for one of two."""
    bit, tiny = on_gpu("bit"), on_gpu("tiny")
    budget = max(bit, tiny) + min(bit, tiny) // 2

    async def test() -> None:
        async with multiplexer(512 * MIB, gpus=(GpuBudget(budget),)) as mux:
            for name in ("bit", "tiny", "bit"):
                tokens, _, _ = await answer(mux, name, a_prompt(3, 20))
                alone = Alone(PATHS[name], N_CTX, N_UBATCH)
                assert tokens == alone.tokens(a_prompt(3, 20), 8)
                alone.close()
                ((used, total),) = mux.gpu_budgets()
                assert 0 < used <= total == budget
                assert [status.name for status in mux.status()] == [name]
                assert mux.status()[0].gpu_bytes == used
            why = [e.why for e in mux.log.events() if e.kind == "unload"]
            assert why == ["for tiny", "for bit"]

    run(test())


def test_models_on_different_gpus_do_not_meet() -> None:
    specs = {
        "a": ModelSpec("a", str(PATHS["bit"]), gpu=0),
        "b": ModelSpec("b", str(PATHS["bit"]), gpu=1, gpu_layers=2),
    }

    async def test() -> None:
        gpus = (GpuBudget(on_gpu("bit")), GpuBudget(on_gpu("bit")))
        async with multiplexer(512 * MIB, specs.__getitem__, gpus=gpus) as mux:
            for name in specs:
                await answer(mux, name, a_prompt(3, 20))
            (first, _), (second, _) = mux.gpu_budgets()
            assert first == on_gpu("bit") and second == on_gpu("bit", 2)
            assert len(mux.status()) == 2

    run(test())


def test_unified_memory_counts_twice() -> None:
    async def test() -> None:
        used = {}
        for unified in (False, True):
            gpus = (GpuBudget(on_gpu("bit"), unified),)
            async with multiplexer(512 * MIB, gpus=gpus) as mux:
                await mux.load("bit")
                used[unified] = mux.budget()[0]
        assert used[True] - used[False] == on_gpu("bit")

    run(test())


def test_what_can_never_fit_is_refused_by_name() -> None:
    def find(name: str) -> ModelSpec:
        return ModelSpec(name, str(PATHS["bit"]), gpu=int(name), gpu_layers=99)

    async def test() -> None:
        async with multiplexer(512 * MIB, find, gpus=(GpuBudget(MIB),)) as mux:
            with pytest.raises(DoesNotFit, match="of GPU 0") as refused:
                await answer(mux, "0", a_prompt(3, 20))
            assert refused.value.smallest_bytes == on_gpu("bit")
            with pytest.raises(UsageError, match="GPU 1, but 1 have a budget"):
                await answer(mux, "1", a_prompt(3, 20))
        async with multiplexer(512 * MIB, find) as mux:
            with pytest.raises(UsageError, match="0 have a budget"):
                await answer(mux, "0", a_prompt(3, 20))

    run(test())


def test_budgets_are_those_of_gpus_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[engine]\ngpu_budgets = ["6M", 7]\n[model.x]\ngpu = 1\ngpu_layers = 3\n')
    config = load_config(file, environment=NOTHING)
    assert config.engine.gpu_budgets == [6 * MIB, 7] and config.model["x"].gpu_layers == 3
    environment = {**NOTHING, "NEXUS_ENGINE_GPU_BUDGETS": "1G,2G"}
    assert load_config(environment=environment).engine.gpu_budgets == [1 << 30, 2 << 30]
    assert gpu_budgets([]) == ()
    monkeypatch.setattr(ggml, "gpus", lambda: [])
    with pytest.raises(UsageError, match=r"llama\.cpp finds 0 here"):
        gpu_budgets([5])
    found = [
        (ggml.Device(f"GPU{i}", "", 1, free_bytes=10 * MIB, total_bytes=10 * MIB), i == 1)
        for i in range(2)
    ]
    monkeypatch.setattr(ggml, "gpus", lambda: found)
    assert gpu_budgets([6 * MIB, 7]) == (GpuBudget(6 * MIB), GpuBudget(7, unified=True))
    with pytest.raises(UsageError, match="GPU1 has"):
        gpu_budgets([1, 11 * MIB])
