"""Our own kernels inside a running model: the same bits as stock llama.cpp on the ternary models,
resident and partly streamed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama, kernels
from nexus_ext.errors import UsageError
from nexus_ext.formats import open_model
from nexus_ext.hardware.system import System
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime.own_kernels import describe, same_bits, takes_over, usable_mode
from nexus_ext.runtime.pinning import pin_threads
from nexus_ext.runtime.planning import plan_model
from tests.cli_support import hardware_file, run
from tests.integration.streaming import SMALL, logits, paged, prompt, stock
from tests.models_folder import find_model

TOKENS = prompt(40, 500)
ARGUMENTS: dict[str, Any] = {**SMALL, "n_ctx": 512, "logits_all": True}
MODELS = ["bitllama-3M-tq2_0.gguf", "bitllama-3M-tq1_0.gguf"]


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    return find_model(request.param)


def test_resident_model_gives_the_bits_of_stock(path: Path) -> None:
    with stock(path, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with closing(Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == (path.stem.rpartition("-")[2],)
        assert llm.nexus.model is not None and llm.nexus.model.n_packed() == 56
        assert llm.nexus.model.attached_bytes() > 0
        seen = logits(llm, TOKENS)
    if same_bits(path.stem.rpartition("-")[2]):
        assert np.array_equal(seen, wanted)
    else:  # another order of summing
        a, b = seen.view(np.float32), wanted.view(np.float32)
        assert np.abs(a - b).max() < 0.05


@pytest.mark.parametrize("isa", kernels.usable_isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    path = find_model(MODELS[0])
    before = kernels.current_isa()
    with closing(Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)) as llm:
        wanted = logits(llm, TOKENS, n_decode=2)
        try:
            kernels.use_isa(isa)
            assert np.array_equal(logits(llm, TOKENS, n_decode=2), wanted)
        finally:
            kernels.use_isa(before)


def test_partly_streamed_model_gives_the_bits_of_stock() -> None:
    path = find_model(MODELS[0])
    with stock(path, n_ctx=512) as llm:
        wanted = logits(llm, TOKENS)
    with paged(path, "1M", kernels="auto", n_ctx=512) as llm:
        seen = logits(llm, TOKENS)
        if same_bits("tq2_0"):
            assert 0 < llm.nexus.model.n_packed() < 56
            assert llm.nexus.stats().bytes_read > 0
        assert np.array_equal(seen, wanted)


def test_auto_takes_only_what_is_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_model(MODELS[0])
    monkeypatch.setattr("nexus_ext.runtime.own_kernels.same_bits", lambda name: False)
    with closing(Llama(path, ram="2G", kernels="auto", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == () and not llm.nexus.active
    monkeypatch.setattr("nexus_ext.runtime.own_kernels.same_bits", lambda name: None)
    with pytest.raises(UsageError, match="no place for our kernels"):
        Llama(path, ram="2G", kernels="nexus", **ARGUMENTS)


def test_auto_is_the_default_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_model(MODELS[0])
    fast = bool(same_bits("tq2_0")) and kernels.current_isa() != "reference"
    with closing(Llama(path, ram="2G", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == (("tq2_0",) if fast else ())
        assert llm.nexus.active == fast
        seen = logits(llm, TOKENS, n_decode=2)
    with closing(Llama(path, ram="2G", kernels="ggml", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == () and not llm.nexus.active
        assert np.array_equal(logits(llm, TOKENS, n_decode=2), seen)
    monkeypatch.setattr(kernels, "current_isa", lambda: "reference")  # which is slow
    with closing(Llama(path, ram="2G", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == ()


def test_auto_leaves_models_without_such_weights_alone() -> None:
    with closing(Llama(find_model("stories260K-q8_0.gguf"), ram="2G", **ARGUMENTS)) as llm:
        assert llm.nexus.own_kernels == () and not llm.nexus.active


def test_a_typing_mistake_is_named() -> None:
    with pytest.raises(UsageError, match="'nexsu'"):
        Llama(find_model(MODELS[0]), ram="2G", kernels="nexsu", **ARGUMENTS)


def test_opencl_without_a_device_is_auto_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "open_opencl", lambda: (False, "there is no OpenCL: of course"))
    assert usable_mode("opencl") == "auto"
    assert "of course; the CPU computes" in caplog.text
    assert "of course" in describe((), "opencl")
    assert usable_mode("nexus") == "nexus"


def test_pinning_more_threads_than_processors_is_refused() -> None:
    with pytest.raises(UsageError, match="9999 threads cannot be pinned"):
        Llama(
            find_model(MODELS[0]),
            ram="2G",
            pin_cores=True,
            **{**ARGUMENTS, "n_threads_batch": 9999},
        )


def test_a_system_that_binds_no_threads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sentence = pin_threads(None, 2, System(platform="darwin"))  # type: ignore[arg-type]
    assert sentence.startswith("pin_cores has no effect: macOS") and sentence in caplog.text


def test_the_command_says_whose_kernels_it_uses(tmp_path: Path) -> None:
    hardware = hardware_file(tmp_path)
    options = [
        "--hardware",
        hardware,
        "--ram",
        "2G",
        "-t",
        "1",
        "--temp",
        "0",
        "-n",
        "8",
        "-c",
        "128",
    ]
    answers = {}
    for choice in ("ggml", "auto"):
        done = run("run", find_model(MODELS[0]), "Once", *options, "--kernels", choice)
        assert done.status == 0, done.err
        answers[choice] = done.out
        assert ("kernels for tq2_0" in done.err) == (choice == "auto" and bool(same_bits("tq2_0")))
    assert answers["auto"] == answers["ggml"]


def test_a_benchmark_knows_whether_something_of_ours_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_model(str(find_model(MODELS[0])))
    plan = plan_model(str(find_model(MODELS[0])), PlanRequest()).plan
    fast = bool(same_bits("tq2_0")) and kernels.current_isa() != "reference"
    assert plan.everything_fits and takes_over(catalog, plan) == fast
    monkeypatch.setattr("nexus_ext.runtime.own_kernels.same_bits", lambda name: False)
    assert not takes_over(catalog, plan)
