"""`nexus quantize`: llama.cpp's own bytes, types where they were asked for, errors with names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from nexus_ext.errors import NexusError, UsageError, WriteFailed
from nexus_ext.formats import open_gguf
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.allocation import Allocation
from nexus_ext.quality.importance import Importance, ImportanceMatrix
from nexus_ext.runtime import (
    allocation,
    refinement,
    sensitivity,
    tensor_codec,
)
from nexus_ext.runtime import quantize as quantize_module
from nexus_ext.runtime.quantize import base_name, planned_types, quantize, type_named
from nexus_ext.runtime.weights import Weights
from nexus_ext.testing.synthetic import write_llama
from tests.cli_support import call
from tests.models_folder import find_model
from tests.stories import STORIES
from tests.trained_model import write_trained_f16

MATRIX = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small llama in F16 whose rows are multiples of 256."""
    path = tmp_path_factory.mktemp("source") / "f16.gguf"
    [written] = write_llama(
        path, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=512, quant="F16"
    )
    return str(written)


def importance(source: str, seed: int = 1) -> ImportanceMatrix:
    rng = np.random.default_rng(seed)
    entries = {}
    for tensor in open_gguf(source).tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk"):
            sums = rng.exponential(1.0, (1, tensor.shape[0])) ** 4
            entries[tensor.name] = Importance(sums, np.array([1], np.uint64))
    return ImportanceMatrix(entries, 1)


def encoded(path: str, name: str) -> bytes:
    weights = Weights(open_gguf(path))
    return weights.encoded(weights.tensors[name]).tobytes()


def test_types_are_those_of_the_file_type(source: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    target = tmp_path / "q4.gguf"
    made = quantize(source, target, "Q4_K", progress=lambda *event: seen.append(event))
    assert made.tensor_types == {t.name: t.type_name for t in open_gguf(target).tensors}
    planned = planned_types(source, "q4_k_m")
    assert planned[MATRIX] in ("Q4_K", "Q6_K")
    assert {n: made.tensor_types[n] for n in planned} == planned
    assert made.nbytes == os.path.getsize(target)
    assert [done for _, done, _ in seen] == list(range(1, seen[0][2] + 1))
    assert made.fallbacks == ()


def test_a_tensor_gets_the_type_it_was_given_and_the_bytes_of_ggml(
    source: str, tmp_path: Path
) -> None:
    imatrix = importance(source)
    names = {MATRIX: "Q3_K", "blk.0.attn_q.weight": "Q8_0"}
    target = str(tmp_path / "mixed.gguf")
    made = quantize(source, target, "q4_k_m", imatrix=imatrix, types=names)
    assert {n: made.tensor_types[n] for n in names} == names
    weights = Weights(open_gguf(source))
    for name, type_name in names.items():
        kind, tensor = type_named(type_name), weights.tensors[name]
        mine = tensor_codec.encode(
            kind, weights.rows(tensor, slice(None)), imatrix.entries[name].mean_squares[0]
        )
        assert encoded(target, name) == mine
    plain = str(tmp_path / "plain.gguf")
    quantize(source, plain, "q4_k_m", types=names)
    assert encoded(plain, MATRIX) != encoded(target, MATRIX)  # importance was used


def test_an_importance_matrix_lowers_the_error_that_it_weighs(source: str) -> None:
    weights, imatrix = Weights(open_gguf(source)), importance(source)
    tensor, kinds = weights.tensors[MATRIX], [type_named(n) for n in ("Q2_K", "Q4_K", "Q8_0")]
    found = sensitivity.errors_of(weights, tensor, kinds, imatrix)
    assert found["Q2_K"] > 4 * found["Q4_K"] > 100 * found["Q8_0"] > 0
    rows = weights.rows(tensor, slice(None))
    weight = imatrix.entries[MATRIX].sums[0]
    blind = rows - tensor_codec.decode(
        kinds[0], tensor_codec.encode(kinds[0], rows), tensor.shape[0]
    )
    total = np.square(rows, dtype=np.float64).sum(axis=0) @ weight
    assert found["Q2_K"] < np.square(blind, dtype=np.float64).sum(axis=0) @ weight / total


def test_rows_are_decoded_as_the_gguf_package_decodes_them(source: str, tmp_path: Path) -> None:
    target = str(tmp_path / "q.gguf")
    names = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    quantize(
        source,
        target,
        "q4_k_m",
        types={
            f"blk.1.{t}.weight": n
            for t, n in zip(
                ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
                names,
                strict=True,
            )
        },
    )
    weights = Weights(open_gguf(target))
    for raw in gguf.GGUFReader(target).tensors:
        tensor = weights.tensors[raw.name]
        if len(tensor.shape) == 2:
            expected = gguf.quants.dequantize(raw.data, raw.tensor_type)
            np.testing.assert_allclose(weights.rows(tensor, slice(None)), expected, rtol=1e-6)


def test_rows_that_a_type_does_not_divide_are_named(tmp_path: Path) -> None:
    source = find_model("stories260K-f32.gguf")  # rows of 64
    made = quantize(source, tmp_path / "q.gguf", "q4_k_m")
    assert made.fallbacks[0].endswith("rows of 64, not a multiple of 256")
    with pytest.raises(UsageError, match="has rows of 64 weights, and Q4_K packs 256 at a time"):
        quantize(source, tmp_path / "w.gguf", "q4_k_m", types={"blk.0.attn_q.weight": "Q4_K"})


def test_what_cannot_be_done_is_refused_with_a_reason(source: str, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    with pytest.raises(UsageError, match="no quantization 'q4_k_x'") as wrong:
        quantize(source, target, "q4_k_x")
    assert "q4_k_m" in wrong.value.hint
    assert base_name("Q3_K") == "q3_k_m"
    with pytest.raises(UsageError, match=r"is quantized already: \d+ tensors, the first is"):
        quantize(find_model("stories260K-q4_0.gguf"), target, "q4_0")
    with pytest.raises(UsageError, match="without an importance matrix"):
        quantize(source, target, "iq2_xs")
    with pytest.raises(UsageError, match="is the source itself"):
        quantize(source, source, "q4_k_m", overwrite=True)
    with pytest.raises(UsageError, match="no tensor 'nothing'"):
        quantize(source, target, "q4_k_m", types={"nothing": "Q4_K"})
    with pytest.raises(UsageError, match="ggml has no type 'Q9_K'"):
        quantize(source, target, "q4_k_m", types={MATRIX: "Q9_K"})
    other = Importance(np.ones((1, 3)), np.array([1], np.uint64))
    with pytest.raises(UsageError, match=r"has 3 channels in 1 matrices for blk\.1\.ffn_down"):
        quantize(source, target, "q4_k_m", imatrix=ImportanceMatrix({MATRIX: other}, 1))
    with pytest.raises(UsageError, match="knows no tensor of this model"):
        quantize(source, target, "q4_k_m", imatrix=ImportanceMatrix({"other": other}, 1))
    assert not any(tmp_path.iterdir())
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        quantize(source, target, "q4_k_m")
    assert target.read_bytes() == b"mine"


def test_quantized_sources_are_taken_when_that_is_asked_for(tmp_path: Path) -> None:
    made = quantize(
        find_model("stories260K-q4_0.gguf"), tmp_path / "q.gguf", "q8_0", allow_requantize=True
    )
    assert "Q8_0" in made.tensor_types.values()


def test_a_disk_that_fills_up_leaves_nothing(source: str, tmp_path: Path) -> None:
    job = quantize_module.QuantizeJob(source, "/dev/full", "q8_0", {}, None, 1, False)
    with pytest.raises(WriteFailed, match="/dev/full: cannot be written"):
        quantize_module._run_worker(job, str(tmp_path), lambda *_: None)


def test_a_model_that_llama_cpp_does_not_know_is_its_own_sentence(
    source: str, tmp_path: Path
) -> None:
    data = Path(source).read_bytes()
    changed = tmp_path / "unknown.gguf"
    changed.write_bytes(data.replace(b"llama", b"lorem", 1 << 20))
    with pytest.raises(NexusError, match="unknown model architecture: 'lorem'"):
        quantize(changed, tmp_path / "q.gguf", "q4_k_m")
    assert not (tmp_path / "q.gguf").exists() and not (tmp_path / "q.gguf.part").exists()


def test_a_worker_that_dies_is_reported(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module.sys, "executable", "/bin/false")
    with pytest.raises(NexusError, match="ended with status 1 and no result"):
        quantize(source, tmp_path / "q.gguf", "q4_k_m")
    assert not any(tmp_path.iterdir())


def test_the_command_can_be_interrupted(source: str, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    command = ["quantize", source, "-o", str(target), "--base", "q2_k"]
    child = subprocess.Popen(
        [sys.executable, "-m", "nexus_ext.cli", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    part = Path(f"{target}.part")
    while child.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    # Either it was stopped, and nothing is left, or it was done before.
    assert not part.exists(), errors
    assert (child.returncode == 130) != target.exists(), errors


# -- allocation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_f16(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_trained_f16(tmp_path_factory.mktemp("trained") / "f16.gguf")


def test_groups_cover_every_tensor_once(source: str) -> None:
    tensors = [t for t in open_gguf(source).tensors if len(t.shape) == 2]
    many = [
        replace(t, name=f"blk.{i}.{k}.weight", layer=i)
        for i in range(40)
        for t in tensors[:1]
        for k in ("attn_q", "ffn_up")
    ]
    assert sensitivity.probe_groups(many[:10]) == [[t] for t in many[:10]]
    groups = sensitivity.probe_groups(many, most=8)
    assert len(groups) == 8
    assert sorted(t.name for g in groups for t in g) == sorted(t.name for t in many)
    for group in groups:
        layers = [t.layer or 0 for t in group]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert len({t.name.split(".")[2] for t in group}) == 1


def test_a_changed_copy_is_what_is_computed_with_and_is_put_back(trained_f16: str) -> None:
    weights = Weights(open_gguf(trained_f16))
    imatrix = ImportanceMatrix({}, 0)
    pick = [weights.tensors[f"blk.0.{n}.weight"] for n in ("attn_q", "ffn_down")]

    def probe(tensor: object) -> object:
        return type_named("Q2_K")

    args: dict[str, object] = {"n_ctx": 64, "most": 4, "n_threads": 2}
    before = Path(trained_f16).read_bytes()
    found = sensitivity.measure_divergences(
        weights,
        [pick[:1], pick[1:], pick],
        probe,
        imatrix,
        STORIES,
        **args,  # type: ignore[arg-type]
    )
    assert found[0] > 1e-5 and found[1] > 1e-5
    assert found[2] > max(found[:2])
    again = sensitivity.measure_divergences(
        weights,
        [pick[1:]],
        probe,
        imatrix,
        STORIES,
        **args,  # type: ignore[arg-type]
    )
    assert again == [found[1]]  # nothing of the others was left in the copy
    assert Path(trained_f16).read_bytes() == before


def test_an_allocation_loses_less_than_one_type_for_all_of_the_same_size(
    trained_f16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_ext.runtime.imatrix import collect_imatrix
    from nexus_ext.runtime.planning import plan_model
    from nexus_ext.runtime.quality import compare_models

    request = PlanRequest(
        n_ctx=64, n_batch=64, n_ubatch=64, n_threads=2, gpu_bytes=0, logits_all=True
    )
    planned = plan_model(trained_f16, request)
    imatrix = collect_imatrix(trained_f16, STORIES, planned, request, n_ctx=64, most=8)
    types = ("Q2_K", "Q3_K", "Q4_K")
    tensors = open_gguf(trained_f16).tensors
    monkeypatch.setattr(sensitivity, "_MAX_PROBES", 24)
    monkeypatch.setattr(sensitivity, "_SAMPLE", 1 << 16)
    known = allocation.measure(
        trained_f16, imatrix, STORIES, types=types, n_ctx=64, most=4, n_threads=2
    )
    uniform = quantize(
        trained_f16,
        tmp_path / "uniform.gguf",
        "q3_k_m",
        imatrix=imatrix,
        types={t.name: "Q3_K" for t in known.tensors},
    )
    found = known.allocation(uniform.bits_per_weight)
    mixed = quantize(
        trained_f16, tmp_path / "mixed.gguf", "q4_k_m", imatrix=imatrix, types=found.types
    )
    assert mixed.weight_nbytes <= uniform.weight_nbytes
    assert len(set(found.types.values())) > 1
    assert found.nbytes + known.fixed_nbytes == mixed.weight_nbytes
    assert sum(t.nbytes for t in tensors if len(t.shape) == 1) == known.fixed_nbytes

    def divergence(path: str) -> float:
        return compare_models(path, trained_f16, STORIES, request).kl_mean.value

    # Measured on a few hundred tokens in groups; with all of them the gain is larger.
    assert divergence(mixed.path) < 0.97 * divergence(uniform.path)


def test_an_allocation_is_improved_by_steps_from_where_it_stands(
    trained_f16: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(open_gguf(trained_f16))
    imatrix = ImportanceMatrix({}, 0)
    monkeypatch.setattr(sensitivity, "_SAMPLE", 1 << 16)
    monkeypatch.setattr(refinement, "_MAX_PROBES", 9)
    types = ("Q2_K", "Q3_K", "Q4_K")
    known = allocation.measure(trained_f16, imatrix, None, method="error", types=types)
    # The large types where they do least.
    kinds = {t.name: "Q2_K" if "ffn" in t.name else "Q4_K" for t in known.tensors}
    sizes = {item.name: {c.type_name: c.nbytes for c in item.choices} for item in known.items()}
    budget = sum(sizes[name][kind] for name, kind in kinds.items())
    start = Allocation(kinds, budget, 0.0)

    def refined(rounds: int) -> Allocation:
        return refinement.refine(
            weights, known, start, budget, imatrix, STORIES, n_ctx=64, most=3, rounds=rounds
        )

    before = refined(0)
    assert before.types == kinds and before.nbytes == budget
    seen = refined(1)
    assert seen.loss < 0.9 * before.loss and seen.nbytes <= budget
    assert seen.nbytes == sum(sizes[name][kind] for name, kind in seen.types.items())
    assert seen.types != kinds


def test_types_are_chosen_by_the_name_of_a_set_or_one_by_one() -> None:
    assert allocation.types_named("default") == allocation.DEFAULT_TYPES
    assert set(allocation.types_named("Compact")) == {*allocation.DEFAULT_TYPES, "IQ3_S", "IQ3_XXS"}
    assert allocation.types_named("q2_k, IQ3_S") == ("Q2_K", "IQ3_S")
    with pytest.raises(UsageError, match="no type 'small'"):
        allocation.types_named("Q2_K,small")


def test_compact_types_lose_less_at_the_same_size(source: str) -> None:
    found = {
        name: allocation.measure(
            source,
            importance(source),
            None,
            method="error",
            types=allocation.types_named(name),
        ).allocation(3.3)
        for name in allocation.TYPE_SETS
    }
    assert found["compact"].nbytes <= 1.01 * found["default"].nbytes
    assert found["compact"].loss < found["default"].loss
    assert {"IQ3_S", "IQ3_XXS"} & set(found["compact"].types.values())


def test_errors_alone_need_no_text(source: str) -> None:
    known = allocation.measure(source, importance(source), None, method="error")
    assert all(s.divergence_per_error == 1.0 for s in known.sensitivities.values())
    sizes = [known.allocation(bits).nbytes for bits in (3.0, 4.0, 6.0)]
    assert sizes == sorted(sizes)
    with pytest.raises(UsageError, match="measured on a text"):
        allocation.measure(source, importance(source), None)
    with pytest.raises(UsageError, match="are less than what is not quantized takes"):
        known.allocation(1e-6)
    with pytest.raises(UsageError, match="smallest types take"):
        allocation.measure(
            source, importance(source), None, method="error", types=("Q5_1",)
        ).allocation(1.0)


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_refines_an_allocation(
    trained_f16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(STORIES)
    monkeypatch.setattr(sensitivity, "_SAMPLE", 1 << 16)
    monkeypatch.setattr(sensitivity, "_MAX_PROBES", 8)
    monkeypatch.setattr(refinement, "_MAX_PROBES", 8)
    common = ("quantize", trained_f16, "--base", "q4_k_m", "-c", "64", "--calibrate", text)
    common += ("--allocate", "3.5", "--types", "Q2_K,Q4_K", "-t", "2", "--json")
    found = []
    for method in ("measured", "refined"):
        target = tmp_path / f"{method}.gguf"
        done = call(*common, "-o", target, "--sensitivity", method)
        assert done.status == 0, done.err
        assert done.json["bits_per_weight"] <= 3.5
        found.append(done.json["estimated_divergence"])
    assert all(value > 0 for value in found)  # the first adds up what was measured alone


def test_the_command_calibrates_allocates_and_writes(trained_f16: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(STORIES)
    target, kept = tmp_path / "q.gguf", tmp_path / "imatrix.gguf"
    common: Sequence[str | Path] = ("quantize", trained_f16, "--base", "q4_k_m", "-c", "64")
    done = call(
        *common,
        "-o",
        target,
        "--calibrate",
        text,
        "--save-imatrix",
        kept,
        "--allocate",
        "4",
        "--sensitivity",
        "error",
        "--types",
        "Q3_K,Q4_K",
        "--json",
        "-t",
        "2",
    )
    assert done.status == 0, done.err
    assert done.json["bits_per_weight"] <= 4.0
    assert done.json["nbytes"] == target.stat().st_size
    assert done.json["calibration_tokens"] > 0
    assert set(done.json["tensor_types"].values()) >= {"Q3_K", "F32"}
    again = call(*common, "-o", tmp_path / "r.gguf", "--imatrix", kept)
    assert again.status == 0, again.err
    assert "bits per weight" in again.out
    for arguments, message in (
        (("--calibrate", text, "--imatrix", kept), "both name the importance"),
        (("--allocate", "4"), "goes by a text"),
        (("--save-imatrix", kept), "nothing to save"),
        (("--imatrix", kept, "--allocate", "4"), "measured on a text"),
        (("--calibrate", text), "exists already"),
    ):
        failed = call(*common, "-o", target, *arguments)
        assert failed.status == 2, failed.err
        assert message in failed.err
    assert json.loads(call(*common, "-o", target, "--json").out)["error"]["code"] == "usage"
