"""Residuals from a file: `Llama(residual=...)` is nearer to the original, within its memory."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import DoesNotFit, FormatError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.residuals import read_residual, read_residuals
from nexus_ext.kernels import Residual
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime import residual as residual_module
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.quantize import planned_types, quantize
from nexus_ext.runtime.residual import (
    make_residuals,
    memory_nbytes,
    plan_with_room,
)
from nexus_ext.runtime.residual_tuning import SHARES
from nexus_ext.runtime.weights import Weights
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.cli_support import call
from tests.models_folder import find_model
from tests.stories import STORIES

REQUEST = PlanRequest(n_ctx=64, n_batch=64, n_ubatch=64, n_threads=2, gpu_bytes=0, logits_all=True)
SMALL: dict[str, Any] = {"n_ctx": 64, "n_threads": 2, "n_gpu_layers": 0, "verbose": False}


@pytest.fixture(scope="module")
def source() -> str:
    return str(find_model("stories260K-f32.gguf"))


@pytest.fixture(scope="module")
def rough(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with its matrices in Q4_0, with a sidecar."""
    target = str(tmp_path_factory.mktemp("rough") / "q4_0.gguf")
    kinds = {n: t for n, t in planned_types(source, "q4_0").items() if t == "Q4_0"}
    quantize(source, target, "q4_0", types={**kinds, "token_embd.weight": "Q8_0"})
    make_residuals(source, target)
    return target


def test_a_sidecar_holds_what_quantization_lost(source: str, rough: str) -> None:
    table = read_residuals(rough + ".nxr")
    exact, lossy = Weights(open_gguf(source)), Weights(open_gguf(rough))
    assert "blk.0.attn_q.weight" in {t.name for t in table.tensors}
    for stored in table.tensors:
        codes, scales = read_residual(table, stored)
        found = Residual(
            np.frombuffer(codes, np.uint8).reshape(stored.n_in, -1),
            np.frombuffer(scales, np.float32),
        ).decode()
        lost = exact.rows(exact.tensors[stored.name], slice(None)) - lossy.rows(
            lossy.tensors[stored.name], slice(None)
        )
        assert np.square(found - lost).sum() < 0.02 * np.square(lost).sum()


def test_more_channels_bring_the_predictions_nearer(source: str, rough: str) -> None:
    with opened(source, plan_model(source, REQUEST), REQUEST) as llm:
        llm.n_batch = 1
        kept = record_reference(llm, STORIES, n_ctx=64, most=3)
    divergences = []
    with (
        kept,
        opened(
            rough, plan_model(rough, REQUEST), REQUEST, residual=rough + ".nxr", residual_share=0.0
        ) as llm,
    ):
        assert llm.nexus.active  # though everything fits
        llm.n_batch = 1
        for share in (0.0, 0.25, 1.0):
            llm.nexus.residuals.set_share(share)
            divergences.append(float(scores_against(llm, kept).kl.mean()))
        assert llm.nexus.residuals.bytes_per_token() == llm.nexus.residuals.table.nbytes
        with pytest.raises(UsageError, match="between 0 and 1"):
            llm.nexus.residuals.set_share(1.5)
    assert divergences[1] < 0.8 * divergences[0]
    assert divergences[2] < 0.5 * divergences[0]


def test_columns_by_themselves_are_corrected_as_single_tokens_are(rough: str) -> None:
    """Several columns, dealt out to threads; attention alone may round otherwise."""
    seen = {}
    with closing(
        Llama(rough, residual=rough + ".nxr", residual_share=0.2, logits_all=True, **SMALL)
    ) as llm:
        tokens = llm.tokenize(STORIES)[:24]
        for share, columns in ((0.2, 1), (0.2, 8), (0.0, 1)):
            llm.nexus.residuals.set_share(share)
            llm.nexus.model.set_columns(columns > 1)
            llm.n_batch = columns
            llm.reset()
            llm.eval(tokens)
            seen[share, columns] = llm.scores[: len(tokens)].copy()
    alone, together, plain = (seen[key] for key in ((0.2, 1), (0.2, 8), (0.0, 1)))
    assert np.abs(alone - together).max() < 0.01 * np.abs(alone - plain).max()


def test_a_share_is_found_when_none_is_given(rough: str) -> None:
    llm = Llama(rough, residual=rough + ".nxr", **SMALL)
    try:
        assert llm.nexus.residuals is not None
        shares = llm.nexus.residuals.shares
        assert set(shares) == {"token_embd", "attn_qkv", "attn_output", "ffn_gate_up"}
        assert all(0 <= share <= max(SHARES) for share in shares.values())
        assert llm("Once", max_tokens=4)["choices"][0]["text"]
    finally:
        llm.close()


def test_what_each_kind_repairs_is_measured(rough: str) -> None:
    with closing(Llama(rough, residual=rough + ".nxr", residual_share=0.0, **SMALL)) as llm:
        residuals = llm.nexus.residuals
        assert residuals is not None
        seen = residuals.observe(llm)
        assert residuals.share == 0.0 and seen.token_s > 0
        assert [e.kind for e in seen.effects] == list(residuals.kinds)
        # In Q4_0 something can be repaired, in Q8_0 (embedding and head) next to nothing.
        repaired = {e.kind: e.repaired[1] / seen.divergence for e in seen.effects}
        assert abs(repaired.pop("token_embd")) < 0.1 < max(repaired.values()) < 1
        residuals.spread(seen, 0.06)
        assert 0.04 < residuals.share < 0.08
        assert len(set(residuals.shares.values())) > 1
        before = residuals.shares.copy()
        for wrong, message in (
            ({"attn_qkv": 2.0}, "between 0 and 1"),
            ({"ffn": 0.1}, "no residuals of"),
        ):
            with pytest.raises(UsageError, match=message):
                residuals.set_shares(wrong)
        assert residuals.shares == before
    with pytest.raises(UsageError, match="open for embeddings"):
        Llama(rough, residual=rough + ".nxr", embedding=True, **SMALL)


def test_without_room_nothing_is_corrected_and_that_is_said(
    rough: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = read_residuals(rough + ".nxr")
    planned, used = plan_with_room(rough, REQUEST, table)
    assert used is not None and planned.plan.everything_fits
    assert planned.plan.breakdown["residuals"] == memory_nbytes(table) >= table.nbytes
    same = replace(REQUEST, ram_bytes=planned.plan.ram_bytes)
    assert plan_with_room(rough, same, table)[1] is not None
    with caplog.at_level(logging.WARNING, "nexus_ext.runtime"):
        large = replace(table, tensors=table.tensors * 4000)
        planned, used = plan_with_room(rough, same, large)
    assert used is None and planned.plan.everything_fits
    assert planned.plan.breakdown["residuals"] == 0
    assert "there is no room for" in caplog.text


def smallest_budget(path: str) -> int:
    with pytest.raises(DoesNotFit) as wrong:
        plan_model(path, replace(REQUEST, weights_bytes=1))
    return wrong.value.smallest_bytes


def test_residuals_count_against_a_budget_for_weights(rough: str) -> None:
    table = read_residuals(rough + ".nxr")
    nbytes = open_gguf(rough).nbytes
    budget = nbytes + memory_nbytes(table) + (1 << 20)
    planned, used = plan_with_room(rough, replace(REQUEST, weights_bytes=budget), table)
    assert used is not None and planned.plan.everything_fits
    assert planned.plan.weights_bytes >= nbytes + memory_nbytes(table)
    # As much less as streams a part of the weights instead.
    budget = smallest_budget(rough) + memory_nbytes(table)
    planned, used = plan_with_room(rough, replace(REQUEST, weights_bytes=budget), table)
    assert used is not None and not planned.plan.everything_fits
    assert planned.plan.weights_bytes <= budget
    with opened(rough, planned, REQUEST, residual=rough + ".nxr", residual_share=0.5) as llm:
        assert llm.nexus.model.attached_bytes() <= planned.plan.breakdown["residuals"]
    with pytest.raises(DoesNotFit, match="but the weights budget is") as wrong:
        plan_model(rough, replace(REQUEST, weights_bytes=1 << 16, residual_bytes=1 << 16))
    enough = replace(REQUEST, weights_bytes=wrong.value.smallest_bytes, residual_bytes=1 << 16)
    assert plan_model(rough, enough).plan.weights_bytes <= wrong.value.smallest_bytes


def test_a_plan_that_is_given_is_kept_or_refused(rough: str, tmp_path: Path) -> None:
    table = read_residuals(rough + ".nxr")
    need = memory_nbytes(table)
    roomy = plan_model(rough, replace(REQUEST, ram_bytes=1 << 30)).plan
    planned, used = plan_with_room(rough, REQUEST, table, plan=roomy)
    assert used is not None and planned.plan.tiers == roomy.tiers
    assert planned.plan.breakdown["residuals"] == need
    assert planned.plan.breakdown["free"] == roomy.breakdown["free"] - need
    assert plan_with_room(rough, REQUEST, table, plan=planned.plan)[0].plan == planned.plan
    file = tmp_path / "tight.json"
    small = replace(REQUEST, weights_bytes=smallest_budget(rough))
    file.write_text(plan_model(rough, small).plan.to_json())
    with pytest.raises(DoesNotFit, match=r"the plan '.*tight\.json' leaves .* for residuals") as no:
        Llama(rough, plan=file, residual=rough + ".nxr", **SMALL)
    assert "nexus plan MODEL --residual" in no.value.hint and no.value.smallest_bytes == need
    made = call(
        "plan", rough, "--weights", "1M", "--residual", f"{rough}.nxr", "-o", file, "-c", "64"
    )
    assert made.status == 0, made.err
    with closing(Llama(rough, plan=file, residual=rough + ".nxr", **SMALL)) as llm:
        assert llm.nexus.residuals is not None
        assert llm.nexus.plan.breakdown["residuals"] == need


def test_residuals_of_another_model_are_refused(source: str, rough: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.gguf")
    data = bytearray(Path(rough).read_bytes())
    tensor = next(t for t in open_gguf(rough).tensors if t.name == "blk.2.attn_q.weight")
    data[tensor.offset + 5] ^= 0x30  # another weight under the same header
    Path(other).write_bytes(data)
    with pytest.raises(UsageError, match="was made for another model"):
        Llama(other, residual=rough + ".nxr", residual_share=0.1, **SMALL)
    with pytest.raises(FormatError, match="no file of residuals"):
        Llama(other, residual=other, **SMALL)
    with pytest.raises(UsageError, match=r"is Q4_K of \(256, 4096\), which is not what"):
        make_residuals(str(find_model("tinydense-7M-Q4_K_M.gguf")), rough, str(tmp_path / "a.nxr"))
    with pytest.raises(UsageError, match="no quantized matrix"):
        make_residuals(source, source, str(tmp_path / "a.nxr"))
    assert list(tmp_path.iterdir()) == [Path(other)]


def test_experts_are_not_corrected(tmp_path: Path) -> None:
    [moe] = write_moe(tmp_path / "moe.gguf", dims=MoeDims())
    names = [t.name for t in residual_module.correctable(open_gguf(moe))]
    assert names and not any("exps" in name for name in names)


def test_the_commands_make_and_use_a_sidecar(source: str, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    done = call("quantize", source, "-o", target, "--base", "q4_0", "--residual", "--json")
    assert done.status == 0, done.err
    assert done.json["residual"]["path"] == f"{target}.nxr"
    assert done.json["residual"]["nbytes"] == read_residuals(f"{target}.nxr").nbytes
    run = call(
        "run",
        target,
        "Once",
        "-n",
        "4",
        "-c",
        "64",
        "--residual",
        f"{target}.nxr",
        "--residual-share",
        "0.5",
        "--no-chat",
        "--json",
    )
    assert run.status == 0, run.err
    assert run.json["text"]
