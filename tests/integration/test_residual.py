"""Residuals attached to a running model: all channels make it nearly the model in full precision,
batches are left alone, and nothing changes while k is 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from nexus_ext import kernels
from nexus_ext.errors import UsageError
from tests.integration.streaming import logits, paged, prompt, stock
from tests.models_folder import find_model

TOKENS = prompt(12, 500)


@pytest.fixture(scope="module")
def residuals() -> dict[str, kernels.Residual]:
    """W - dequant(Wq) for every matrix of the small model that was quantized."""
    full = {t.name: t for t in GGUFReader(find_model("stories260K-f32.gguf")).tensors}
    found = {}
    for tensor in GGUFReader(find_model("stories260K-q4_0.gguf")).tensors:
        name = str(tensor.name)
        if name == "token_embd.weight" or len(tensor.shape) != 2:
            continue
        exact = np.asarray(full[name].data, np.float32)
        rough = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if not np.array_equal(exact, rough):
            found[name] = kernels.encode_residual(exact - rough)
    return found


def attach(llm: Any, residuals: dict[str, kernels.Residual], k: int) -> None:
    for name, residual in residuals.items():
        llm.nexus.model.attach_residual(name, residual.codes, residual.scales, k)


def decoded(llm: Any) -> Any:
    """Logits of the tokens one by one, float32 (n_tokens, n_vocab)."""
    llm.reset()
    for token in TOKENS:
        llm.eval([token])
    return llm.scores[: len(TOKENS)].copy()


@pytest.fixture(scope="module")
def paths() -> tuple[Path, Path]:
    return find_model("stories260K-q4_0.gguf"), find_model("stories260K-f32.gguf")


@pytest.mark.parametrize("weights", ["60K", "400K"])
def test_all_channels_approach_full_precision(
    weights: str, residuals: dict[str, kernels.Residual], paths: tuple[Path, Path]
) -> None:
    assert residuals
    with stock(paths[1]) as llm:
        full = decoded(llm)
    with paged(paths[0], weights) as llm:
        assert llm.nexus.active
        plain = decoded(llm)
        attach(llm, residuals, 0)
        assert np.array_equal(decoded(llm), plain)
        errors = [float(np.sqrt(np.mean((plain - full) ** 2)))]
        for k in (8, 10_000):
            for name in residuals:
                llm.nexus.model.set_residual_k(name, k)
            errors.append(float(np.sqrt(np.mean((decoded(llm) - full) ** 2))))
    assert errors[1] < errors[0]
    # activations are still rounded to 8 bits, and embeddings to 4
    assert errors[2] < 0.6 * errors[0], errors


def test_batches_are_left_alone(
    residuals: dict[str, kernels.Residual], paths: tuple[Path, Path]
) -> None:
    with paged(paths[0], "60K") as llm:
        before = logits(llm, TOKENS, n_decode=0)
        attach(llm, residuals, 8)
        assert np.array_equal(logits(llm, TOKENS, n_decode=0), before)
        assert llm.nexus.model.attached_bytes() >= sum(r.nbytes for r in residuals.values())


def test_what_does_not_fit_is_refused(
    residuals: dict[str, kernels.Residual], paths: tuple[Path, Path]
) -> None:
    name, residual = next(iter(residuals.items()))
    with paged(paths[0], "60K") as llm:
        model = llm.nexus.model
        assert model is not None
        with pytest.raises(UsageError, match="no tensor no_such"):
            model.attach_residual("no_such", residual.codes, residual.scales, 1)
        with pytest.raises(UsageError, match="bytes of codes"):
            model.attach_residual(name, residual.codes[1:], residual.scales, 1)
        with pytest.raises(UsageError, match="has no residual"):
            model.set_residual_k(name, 1)
        model.attach_residual(name, residual.codes, residual.scales, 1)
        with pytest.raises(UsageError, match="already"):
            model.attach_residual(name, residual.codes, residual.scales, 1)
