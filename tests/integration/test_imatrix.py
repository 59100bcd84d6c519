"""The importance matrix: what goes into each weight, summed in C while llama.cpp computes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from nexus_ext.errors import DoesNotFit, FormatError, NexusError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.importance import Importance, ImportanceMatrix
from nexus_ext.runtime.imatrix import collect_imatrix, load_imatrix, save_imatrix
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened, text_windows
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.models_folder import find_model
from tests.stories import STORIES

N_CTX = 64


def collect(
    path: Path | str, weights_bytes: int | None = None, text: bytes = STORIES, most: int = 3
) -> ImportanceMatrix:
    request = PlanRequest(
        weights_bytes=weights_bytes,
        n_ctx=N_CTX,
        n_batch=N_CTX,
        n_ubatch=N_CTX,
        n_threads=2,
        gpu_bytes=0,
        logits_all=True,
    )
    try:
        planned = plan_model(path, request)
    except DoesNotFit as error:
        request = replace(request, weights_bytes=error.smallest_bytes)
        planned = plan_model(path, request)
    assert planned.plan.everything_fits is (weights_bytes is None)
    return collect_imatrix(str(path), text, planned, request, n_ctx=N_CTX, most=most)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    [written] = write_moe(path, arch="qwen3moe", dims=MoeDims(n_layers=2, n_experts=32, n_used=3))
    return written


def test_the_first_projections_see_the_normalized_embeddings() -> None:
    path = find_model("stories260K-f32.gguf")
    found = collect(path)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    embedding, scale = (
        np.asarray(tensors[name].data, np.float64)
        for name in ("token_embd.weight", "blk.0.attn_norm.weight")
    )
    request = PlanRequest(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, gpu_bytes=0, logits_all=True)
    with opened(str(path), plan_model(path, request), request) as llm:
        tokens = [t for w in text_windows(llm, STORIES, N_CTX, 3) for t in w.tokens]
    x = embedding[tokens]
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * scale
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = found.entries[f"blk.0.{name}.weight"]
        assert entry.counts.tolist() == [len(tokens)] == [found.n_tokens]
        np.testing.assert_allclose(entry.sums[0], (x * x).sum(axis=0), rtol=1e-4)
        np.testing.assert_allclose(entry.mean_squares[0], (x * x).mean(axis=0), rtol=1e-4)


def test_every_matrix_of_the_model_is_seen_and_nothing_else() -> None:
    path = find_model("stories260K-f32.gguf")
    found = collect(path)
    matrices = {t.name for t in open_gguf(path).tensors if len(t.shape) > 1}
    tied = not any(t.name == "output.weight" for t in open_gguf(path).tensors)
    if not tied:
        matrices.discard("token_embd.weight")  # rows are taken from it, nothing is multiplied
    assert found.entries.keys() == matrices


def test_experts_count_the_tokens_that_reach_them(moe: Path) -> None:
    found = collect(moe)
    for layer in range(2):
        gate, up, down = (
            found.entries[f"blk.{layer}.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down")
        )
        assert gate.counts.sum() == 3 * found.n_tokens
        np.testing.assert_array_equal(gate.counts, down.counts)
        np.testing.assert_array_equal(gate.sums, up.sums)
        # With three picks of the same input, all experts together see it three times.
        router = found.entries[f"blk.{layer}.ffn_gate_inp.weight"]
        np.testing.assert_allclose(gate.sums.sum(axis=0), 3 * router.sums[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_streamed_model_gives_the_same_sums(name: str, moe: Path) -> None:
    path = moe if name == "moe" else find_model("bitllama-3M-q4_k_m.gguf")
    weights = open_gguf(path).nbytes * 2 // 3
    resident, streamed = collect(path), collect(path, weights)
    assert resident.entries.keys() == streamed.entries.keys()
    for weight, entry in resident.entries.items():
        np.testing.assert_array_equal(entry.sums, streamed.entries[weight].sums)
        np.testing.assert_array_equal(entry.counts, streamed.entries[weight].counts)


def test_a_model_without_finite_values_is_said_to_have_none(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    shutil.copyfile(find_model("stories260K-f32.gguf"), path)
    tensor = next(t for t in open_gguf(path).tensors if t.name == "blk.1.ffn_norm.weight")
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(np.full(4, np.nan, np.float32).tobytes())
    with pytest.raises(NexusError, match="not finite"):
        collect(path)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="windows of 64 need at least 128"):
        collect(find_model("stories260K-f32.gguf"), text=b"Once upon a time")


def test_a_file_holds_what_was_collected(tmp_path: Path, moe: Path) -> None:
    found = collect(moe)
    path = tmp_path / "calibration.gguf"
    save_imatrix(str(path), found)
    again = load_imatrix(str(path))
    assert again.entries.keys() == found.entries.keys()
    for weight, entry in found.entries.items():
        np.testing.assert_allclose(again.entries[weight].sums, entry.sums, rtol=1e-6)
        np.testing.assert_array_equal(again.entries[weight].counts, entry.counts)
    with pytest.raises(UsageError, match="exists already"):
        save_imatrix(str(path), found)


def test_an_expert_that_nothing_reached_weighs_all_channels_alike() -> None:
    entry = Importance(np.array([[2.0, 8.0], [0.0, 0.0]]), np.array([2, 0], np.uint64))
    np.testing.assert_array_equal(entry.mean_squares, [[1.0, 4.0], [1.0, 1.0]])
    assert ImportanceMatrix({"w": entry}, 2).unused == 1


def test_other_files_are_no_importance_matrices(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not an imatrix"):
        load_imatrix(str(find_model("stories260K-f32.gguf")))

    def written(sums: list[float], counts: list[float]) -> str:
        path = tmp_path / "made.gguf"
        writer = gguf.GGUFWriter(str(path), arch="")
        writer.add_type("imatrix")
        writer.add_tensor("w.weight.in_sum2", np.array([sums], np.float32))
        if counts:
            writer.add_tensor("w.weight.counts", np.array([counts], np.float32).T)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    with pytest.raises(FormatError, match="no sums of squares"):
        load_imatrix(written([1.0, -1.0], [1.0]))
    with pytest.raises(FormatError, match="no sums of squares"):
        load_imatrix(written([1.0, float("nan")], [1.0]))
    with pytest.raises(FormatError, match="3 sums and 2 counts"):
        load_imatrix(written([1.0, 2.0, 3.0], [1.0, 1.0]))
    with pytest.raises(FormatError, match="no F32 tensor"):
        load_imatrix(written([1.0], []))
