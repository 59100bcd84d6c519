"""`nexus quality` prints llama.cpp's own figures, whatever the budget."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import UsageError
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime import reference as reference_module
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened, predictions, text_windows
from nexus_ext.runtime.quality import (
    compare_models,
    measure_perplexity,
    quality_request,
    record_reference,
    scores_against,
)
from tests.cli_support import call
from tests.models_folder import find_model
from tests.stories import STORIES

REQUEST = quality_request(
    PlanRequest(n_ctx=128, n_batch=128, n_ubatch=128, n_threads=2, gpu_bytes=0)
)
# What llama-perplexity of llama-cpp-python 0.3.36 prints for this text with -c 128 -fa off and
# plain CPU buffers; tests/bench/perplexity_tool.py builds that program and compares for any model.
F32_PERPLEXITY, F32_ERROR = 7.0855, 0.57627
Q4_0_PERPLEXITY, Q4_0_ERROR = 7.6475, 0.64504
KL_MEAN, KL_ERROR, KL_P99, KL_MAX = 0.060121, 0.003052, 0.529153, 0.593749
SAME_TOP, LOG_RATIO, LOG_RATIO_ERROR = 0.87013, 0.076325, 0.017355


@pytest.fixture(scope="module")
def f32() -> str:
    return str(find_model("stories260K-f32.gguf"))


@pytest.fixture(scope="module")
def q4_0() -> str:
    return str(find_model("stories260K-q4_0.gguf"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_bytes(STORIES)
    return path


def test_figures_are_those_of_llama_cpps_tool(f32: str, q4_0: str) -> None:
    report = compare_models(q4_0, f32, STORIES, REQUEST)
    assert report.reference_perplexity.value == pytest.approx(F32_PERPLEXITY, abs=2e-4)
    assert report.reference_perplexity.error == pytest.approx(F32_ERROR, abs=2e-5)
    assert report.perplexity.value == pytest.approx(Q4_0_PERPLEXITY, abs=2e-4)
    assert report.perplexity.error == pytest.approx(Q4_0_ERROR, abs=2e-5)
    assert report.kl_mean.value == pytest.approx(KL_MEAN, abs=1e-5)
    assert report.kl_mean.error == pytest.approx(KL_ERROR, abs=1e-5)
    assert report.kl_p99.value == pytest.approx(KL_P99, abs=5e-4)
    assert report.kl_max == pytest.approx(KL_MAX, abs=5e-4)
    assert report.same_top.value == pytest.approx(SAME_TOP, abs=2e-3)
    assert report.log_perplexity_ratio.value == pytest.approx(LOG_RATIO, abs=2e-5)
    assert report.log_perplexity_ratio.error == pytest.approx(LOG_RATIO_ERROR, abs=2e-5)


def test_batches_smaller_than_a_window_give_the_same_figure(f32: str) -> None:
    for n_batch in (128, 48, 16):
        planned = plan_model(f32, REQUEST)
        with opened(f32, planned, REQUEST) as llm:
            llm.n_batch = n_batch
            found = measure_perplexity(llm, STORIES, n_ctx=128)
        assert found.value == pytest.approx(F32_PERPLEXITY, abs=5e-4)


def test_streamed_is_bit_by_bit_what_resident_is() -> None:
    model = str(find_model("tinydense-7M-Q4_K_M.gguf"))
    found = []
    for weights_bytes in (2 << 20, 64 << 20):
        request = PlanRequest(
            weights_bytes=weights_bytes, n_ctx=64, n_batch=64, n_ubatch=64, n_threads=2, gpu_bytes=0
        )
        planned = plan_model(model, quality_request(request))
        with opened(model, planned, request) as llm:
            assert llm.nexus.active is (weights_bytes == 2 << 20)
            parts = text_windows(llm, STORIES, 64, 3)
            found.append(np.concatenate([b.logits.copy() for b in predictions(llm, parts)]))
    assert found[0].shape[0] == 3 * 31
    np.testing.assert_array_equal(found[0].view(np.uint32), found[1].view(np.uint32))


def test_models_of_two_vocabularies_are_not_compared(f32: str) -> None:
    other = str(find_model("tinydense-7M-Q4_K_M.gguf"))
    with pytest.raises(UsageError, match="do not share a vocabulary \\(4096 and 512 tokens\\)"):
        compare_models(other, f32, STORIES, REQUEST)


def test_a_reference_can_be_read_again(f32: str) -> None:
    planned = plan_model(f32, REQUEST)
    with opened(f32, planned, REQUEST) as llm, record_reference(llm, STORIES, n_ctx=128) as kept:
        assert kept.n_predictions == 11 * 63
        for _ in range(2):
            assert scores_against(llm, kept).same_top.all()


def test_a_full_disk_is_named(f32: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(array: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(reference_module.np, "ascontiguousarray", full)
    planned = plan_model(f32, REQUEST)
    with (
        opened(f32, planned, REQUEST) as llm,
        pytest.raises(UsageError, match="No space left on device after") as failed,
    ):
        record_reference(llm, STORIES, n_ctx=128, scratch_dir=str(tmp_path))
    assert "--scratch" in failed.value.hint
    with (
        opened(f32, planned, REQUEST) as llm,
        pytest.raises(UsageError, match="cannot be kept in /nowhere"),
    ):
        record_reference(llm, STORIES, n_ctx=128, scratch_dir="/nowhere")


def test_the_command_alone_and_against(f32: str, q4_0: str, text_file: Path) -> None:
    common = ("--text", text_file, "-c", "128", "-t", "2", "--gpu-mem", "0")
    alone = call("quality", f32, *common, "--json")
    assert alone.status == 0, alone.err
    assert alone.json["perplexity"]["value"] == pytest.approx(F32_PERPLEXITY, abs=2e-4)
    people = call("quality", f32, *common)
    assert "perplexity  7.085" in people.out
    against = call("quality", q4_0, "--against", f32, *common, "--windows", "4", "--json")
    assert against.status == 0, against.err
    report = against.json["report"]
    assert report["n_windows"] == 4
    assert report["kl_mean"]["value"] > 0.01
    table = call("quality", q4_0, "--against", f32, *common, "--windows", "4")
    assert "KL divergence, mean" in table.out


def test_texts_that_do_not_do_are_refused(f32: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    done = call("quality", f32, "--text", short)
    assert done.status == 2
    assert "windows of 512 need at least 1024" in done.err
    done = call("quality", f32, "--text", tmp_path / "none.txt")
    assert done.status == 2
    assert "cannot be read" in done.err


def test_the_class_is_the_one_that_users_have(f32: str) -> None:
    with opened(f32, plan_model(f32, REQUEST), REQUEST) as llm:
        assert isinstance(llm, Llama)
