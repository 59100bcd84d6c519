"""Residuals from a file: `Llama(residual=...)` is nearer to the original, within its memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.residuals import read_residual, read_residuals
from nexus_ext.kernels import Residual
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime import residual as residual_module
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.quantize import planned_types, quantize
from nexus_ext.runtime.residual import chosen_share, make_residuals, plan_with_room
from nexus_ext.runtime.weights import Weights
from tests.cli_support import call
from tests.models_folder import find_model
from tests.stories import STORIES
from tests.synth import MoeDims, write_moe

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
        assert llm.nexus.residuals.bytes_per_token() <= llm.nexus.residuals.table.nbytes
        with pytest.raises(UsageError, match="between 0 and 1"):
            llm.nexus.residuals.set_share(1.5)
    assert divergences[1] < 0.8 * divergences[0]
    assert divergences[2] < 0.5 * divergences[0]


def test_a_share_is_found_when_none_is_given(rough: str) -> None:
    llm = Llama(rough, residual=rough + ".nxr", **SMALL)
    try:
        assert llm.nexus.residuals is not None
        assert llm.nexus.residuals.share in (0.0, *residual_module.SHARES)
        assert llm("Once", max_tokens=4)["choices"][0]["text"]
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("times", "share"),
    [
        ({0.0: 1.0, 0.01: 1.01, 0.06: 1.04, 0.25: 1.2}, 0.06),
        ({0.0: 1.0, 0.01: 1.2, 0.06: 1.0, 0.25: 1.0}, 0.0),  # a lucky measurement behind a slow one
        ({0.0: 1.0, 0.01: 0.9, 0.06: 0.9, 0.25: 0.9}, 0.25),
    ],
)
def test_the_largest_share_within_the_time_is_taken(
    times: dict[float, float], share: float
) -> None:
    assert chosen_share(times, 0.05) == share


def test_without_room_nothing_is_corrected_and_that_is_said(
    rough: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = read_residuals(rough + ".nxr")
    planned, used = plan_with_room(rough, REQUEST, table)
    assert used is not None and planned.plan.everything_fits
    with_room = replace(REQUEST, ram_bytes=planned.plan.ram_bytes + table.nbytes + (1 << 20))
    assert plan_with_room(rough, with_room, table)[1] is not None
    smallest = replace(REQUEST, ram_bytes=planned.plan.ram_bytes)
    with caplog.at_level(logging.WARNING, "nexus_ext.runtime"):
        large = replace(table, tensors=table.tensors * 4000)
        planned, used = plan_with_room(rough, smallest, large)
    assert used is None and planned.plan.everything_fits
    assert "there is no room for" in caplog.text


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
