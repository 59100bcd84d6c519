"""Our kernels on weights as they are stored: streamed matrices and experts, the bits of stock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama, kernels
from nexus_ext.errors import NexusError, UsageError
from nexus_ext.runtime.batch import BatchContext, Row, Shape
from nexus_ext.runtime.blueprint import Options, blueprint
from nexus_ext.runtime.elastic import ElasticModel
from nexus_ext.runtime.own_kernels import same_bits
from nexus_ext.runtime.residual import make_residuals
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe
from tests.integration.alone import Alone
from tests.integration.streaming import SMALL, logits, paged, prompt, stock
from tests.models_folder import find_model
from tests.same_bits import needs_same_bits

TOKENS = prompt(40, 300)
MODELS = ["bitllama-3M-tq2_0.gguf", "bitllama-3M-tq1_0.gguf"]
DIMS = MoeDims(n_embd=256, n_ff=256, n_experts=6, n_used=2)


def needs(type_name: str) -> None:
    needs_same_bits(same_bits(type_name), type_name)
    if not kernels.stored_is_fast(type_name):
        pytest.skip(f"rows of {type_name} have no kernel as they are stored: {kernels.why()}")


@contextmanager
def using(isa: str) -> Iterator[None]:
    before = kernels.current_isa()
    kernels.use_isa(isa)
    try:
        yield
    finally:
        kernels.use_isa(before)


@pytest.fixture(scope="module", params=["TQ2_0", "TQ1_0"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / f"moe-{request.param}.gguf"
    write_moe(path, quant=request.param, dims=DIMS)
    return path


def type_of(path: Path) -> str:
    return path.stem.rpartition("-")[2].lower()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_streamed_matrices_give_the_bits_of_stock(name: str, n_threads: int) -> None:
    path = find_model(name)
    needs(type_of(path))
    arguments: dict[str, Any] = {"n_ctx": 512, "n_threads": n_threads}
    with stock(path, **arguments) as llm:
        wanted = logits(llm, TOKENS)
    with paged(path, "1M", **arguments) as llm:
        seen = logits(llm, TOKENS)
        stats = llm.nexus.stats()
        assert stats.bytes_read > 0 and stats.stored_products > 0 and stats.device_products == 0
        assert stats.kernels == kernels.current_isa()
    assert np.array_equal(seen, wanted)


def test_matrices_in_slabs_give_the_bits_of_stock(tmp_path: Path) -> None:
    """Matrices that do not fit into a slab are products of several parts."""
    needs("tq2_0")
    path = tmp_path / "wide.gguf"
    write_llama(
        path, n_layers=3, n_embd=512, n_ff=4096, n_heads=4, n_heads_kv=4, n_vocab=320, quant="TQ2_0"
    )
    with stock(path, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with paged(path, "600K", n_ctx=512) as llm:
        model = llm.nexus.model
        assert model is not None
        seen = logits(llm, TOKENS)
        products = model.own_products()["stored"]
        assert products > 3 * 7 * 7  # of matrices: some were cut
    assert np.array_equal(seen, wanted)


@pytest.mark.parametrize("weights", ["900K", "2G"])
def test_experts_give_the_bits_of_stock(mixture: Path, weights: str) -> None:
    needs(type_of(mixture))
    with stock(mixture, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with paged(mixture, weights, kernels="auto", n_ctx=512) as llm:
        model = llm.nexus.model
        assert model is not None
        seen = logits(llm, TOKENS)
        assert model.own_products()["stored"] >= 3 * DIMS.n_layers * 7
        assert (llm.nexus.stats().bytes_read > 0) == (weights != "2G")
    assert np.array_equal(seen, wanted)


@pytest.mark.parametrize("isa", kernels.usable_isas())
def test_every_instruction_set_gives_the_same_bits(mixture: Path, isa: str) -> None:
    needs(type_of(mixture))
    with paged(mixture, "900K", kernels="auto", n_ctx=512) as llm:
        wanted = logits(llm, TOKENS, n_decode=2)
        with using(isa):  # one without a kernel for stored rows leaves them to ggml
            assert np.array_equal(logits(llm, TOKENS, n_decode=2), wanted)


def test_a_model_of_the_multiplexer_gives_the_same_bits(mixture: Path) -> None:
    """Its dense weights come and go, its experts lie in caches: stored both, or packed."""
    needs(type_of(mixture))
    shape = Shape(n_seq=2, n_ctx=256, n_ubatch=64, n_threads=2)
    alone = Alone(mixture, shape.n_ctx, shape.n_ubatch)
    tokens = TOKENS[:30]
    (expected,) = alone.greedy(tokens, 1)
    alone.close()
    plan = blueprint(mixture, shape, Options())
    assert plan.own_kernels == (type_of(mixture),)
    with ExitStack() as stack:
        model = ElasticModel(plan)
        stack.callback(model.close)
        context = BatchContext(model.pointer, model.core, shape)
        stack.callback(context.close)
        for n_resident in (0, len(plan.units), 2):
            model.set_resident(n_resident)
            before = model.core.own_products()["stored"]
            context.keep(0, 0)
            last = len(tokens) - 1
            context.compute([Row(t, i, 0, i == last) for i, t in enumerate(tokens)])
            assert np.array_equal(context.logits(last), expected), n_resident
            assert model.core.own_products()["stored"] >= before + 3 * DIMS.n_layers


def test_ggml_alone_when_it_is_asked_for(mixture: Path) -> None:
    with paged(mixture, "900K", kernels="ggml", n_ctx=512) as llm:
        logits(llm, TOKENS, n_decode=1)
        assert llm.nexus.model is not None
        assert set(llm.nexus.model.own_products().values()) == {0}
        assert llm.nexus.stats().kernels == "ggml"


def test_a_read_that_fails_is_named_and_the_next_token_works(mixture: Path) -> None:
    needs(type_of(mixture))
    with paged(mixture, "900K", kernels="auto", n_ctx=512) as llm:
        wanted = logits(llm, TOKENS, n_decode=2)
        model = llm.nexus.model
        assert model is not None
        model.inject("eio", count=-1)
        llm.reset()
        with pytest.raises(NexusError, match="Input/output error"):
            for _ in range(3):
                llm.eval(TOKENS)
        model.clear_faults()
        assert np.array_equal(logits(llm, TOKENS, n_decode=2), wanted)


def test_pinned_threads_run_where_they_should(mixture: Path) -> None:
    import os

    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system binds no threads")
    before = os.sched_getaffinity(0)
    n_threads = min(2, len(before))
    arguments: dict[str, Any] = {**SMALL, "n_ctx": 512, "n_threads": n_threads, "logits_all": True}
    with closing(Llama(mixture, pin_cores=True, n_threads_batch=n_threads, **arguments)) as llm:
        assert llm.nexus.model is not None
        cores = llm.nexus.model.cores()
        assert len(set(cores)) == n_threads and set(cores) <= before
        logits(llm, TOKENS, n_decode=2)
        assert os.sched_getaffinity(0) == before  # the calling thread is its own again
        masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
        assert n_threads == 1 or {cores[1]} in masks


def test_processors_that_are_not_there_are_named_and_the_next_token_works(mixture: Path) -> None:
    import os

    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system binds no threads")
    with paged(mixture, "900K", n_ctx=512) as llm:
        wanted = logits(llm, TOKENS, n_decode=1)
        model = llm.nexus.model
        assert model is not None
        before = os.sched_getaffinity(0)
        model.set_cores([1000, 1001])  # as if a cpuset had shrunk
        llm.reset()
        with pytest.raises(NexusError, match="2 threads could not be bound"):
            llm.eval(TOKENS)
        assert os.sched_getaffinity(0) == before
        model.set_cores([])
        assert np.array_equal(logits(llm, TOKENS, n_decode=1), wanted)
        with pytest.raises(UsageError, match="threads cannot be bound to the processors"):
            model.set_cores([5000])


def test_residuals_correct_what_our_kernels_multiply(tmp_path: Path) -> None:
    needs("tq2_0")
    path, residual = find_model(MODELS[0]), str(tmp_path / "tq2_0.nxr")
    make_residuals(str(find_model("bitllama-3M-f16.gguf")), str(path), residual)
    found = {}
    for choice in ("ggml", "auto"):
        arguments = {"kernels": choice, "residual": residual, "residual_share": 0.2}
        with paged(path, "3M", n_ctx=512, **arguments) as llm:
            found[choice] = logits(llm, TOKENS, n_decode=4)
            stats = llm.nexus.stats()
            assert stats.bytes_read > 0 and (stats.stored_products > 0) == (choice == "auto")
    assert np.array_equal(found["auto"], found["ggml"])
    with paged(path, "3M", n_ctx=512) as llm:
        assert not np.array_equal(logits(llm, TOKENS, n_decode=4), found["auto"])
