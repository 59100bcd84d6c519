"""Synthetic models load in llama.cpp and compute finite logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from nexus_ext.formats import open_gguf
from nexus_ext.testing.synthetic import (
    LLAMA_PRESETS,
    llama_dims_for_size,
    write_llama,
    write_moe,
    write_preset,
)
from nexus_ext.testing.synthetic.blocks import WEIGHT_STD, WEIGHT_TYPES
from nexus_ext.testing.synthetic.models import FUSED_ARCHITECTURES, MOE_ARCHITECTURES
from nexus_ext.types import Role
from tests.synth.__main__ import main

llama_cpp = pytest.importorskip("llama_cpp")

Logits = npt.NDArray[np.float32]


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Logits]]:
    """Return a function from a model to the logits of a short text in stock llama.cpp."""
    binding = llama_cpp.llama_cpp
    defaults = binding.llama_model_default_params

    def without_repacking() -> Any:
        # Repacked weights round differently from machine to machine.
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(binding, "llama_model_default_params", without_repacking)

    def run(path: Path) -> Logits:
        model = llama_cpp.Llama(
            str(path), n_ctx=64, n_batch=32, n_threads=2, logits_all=True, verbose=False
        )
        try:
            tokens = model.tokenize("hello, world é".encode())
            model.eval(tokens)
            model.eval([5])
            return np.array(model.scores[: len(tokens) + 1], dtype=np.float32)
        finally:
            model.close()

    yield run


def small_llama(path: Path, **changes: Any) -> list[Path]:
    dims = {"n_layers": 2, "n_embd": 256, "n_ff": 512, "n_heads": 4, "n_heads_kv": 2}
    return write_llama(path, **{**dims, "n_vocab": 512, **changes})


def assert_sane(logits: Logits) -> None:
    assert np.isfinite(logits).all()
    assert 0.01 < float(logits.std()) < 10
    assert len(np.unique(logits[-1])) > logits.shape[1] * 0.9


@pytest.mark.parametrize("quant", WEIGHT_TYPES)
def test_a_dense_model_of_every_weight_type_decodes(
    quant: str, tmp_path: Path, decode: Callable[[Path], Logits]
) -> None:
    (path,) = small_llama(tmp_path / "m.gguf", quant=quant)
    assert_sane(decode(path))


@pytest.mark.parametrize("tied", [False, True])
def test_a_split_model_decodes_like_the_one_that_its_merged_header_describes(
    tied: bool, tmp_path: Path, decode: Callable[[Path], Logits]
) -> None:
    paths = small_llama(tmp_path / "m.gguf", tied=tied, split=3, alignment=64)
    assert len(paths) == 3
    catalog = open_gguf(paths[0])
    whole = bytearray(catalog.header)
    whole += bytes(catalog.virtual_nbytes - len(whole))
    for tensor, offset in zip(catalog.tensors, catalog.virtual_offsets, strict=True):
        data = Path(catalog.files[tensor.file].path).read_bytes()
        whole[offset : offset + tensor.nbytes] = data[tensor.offset :][: tensor.nbytes]
    (tmp_path / "whole.gguf").write_bytes(whole)
    logits = decode(paths[0])
    assert_sane(logits)
    assert np.array_equal(logits, decode(tmp_path / "whole.gguf"))


@pytest.mark.parametrize("arch", MOE_ARCHITECTURES)
def test_every_kind_of_mixture_of_experts_decodes(
    arch: str, tmp_path: Path, decode: Callable[[Path], Logits]
) -> None:
    (path,) = write_moe(tmp_path / "m.gguf", arch=arch)
    assert_sane(decode(path))
    experts = [t for t in open_gguf(path).tensors if t.role is Role.EXPERT]
    assert len(experts) == (6 if arch == "deepseek2" else 9)


@pytest.mark.parametrize("arch", FUSED_ARCHITECTURES)
def test_a_fused_mixture_of_experts_decodes(
    arch: str, tmp_path: Path, decode: Callable[[Path], Logits]
) -> None:
    (path,) = write_moe(tmp_path / "m.gguf", arch=arch, fused=True, quant="Q8_0")
    assert_sane(decode(path))
    names = {t.name for t in open_gguf(path).tensors if t.role is Role.EXPERT}
    assert "blk.1.ffn_gate_up_exps.weight" in names


@pytest.mark.parametrize("quant", WEIGHT_TYPES)
def test_weights_have_zero_mean_and_the_intended_spread(quant: str, tmp_path: Path) -> None:
    (path,) = small_llama(tmp_path / "m.gguf", n_layers=1, quant=quant)
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    weights = dequantize(tensor.data, tensor.tensor_type)
    assert abs(float(weights.mean())) < WEIGHT_STD / 10
    assert WEIGHT_STD / 2 < float(weights.std()) < WEIGHT_STD * 2


def test_the_seed_decides_the_weights_and_tensors_differ(tmp_path: Path) -> None:
    first, again, other = (
        small_llama(tmp_path / name, seed=seed)[0].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other
    tensors = {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / "a").tensors}
    assert tensors["blk.0.ffn_up.weight"] != tensors["blk.1.ffn_up.weight"]
    rows = np.frombuffer(tensors["token_embd.weight"], dtype=np.uint8).reshape(512, -1)
    assert len(np.unique(rows, axis=0)) == 512


def test_rows_that_fill_no_block_fall_back_as_in_llama_cpp(tmp_path: Path) -> None:
    (path,) = small_llama(tmp_path / "m.gguf", n_embd=96, n_ff=172, quant="Q4_K")
    kinds = {t.name: t.type_name for t in open_gguf(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_presets_have_consistent_shapes(preset: str, tmp_path: Path) -> None:
    (path,) = write_preset(tmp_path / "m.gguf", preset, sparse=True)
    dims = LLAMA_PRESETS[preset]
    shape = open_gguf(path).shape
    assert (shape.n_layers, shape.n_embd) == (dims.n_layers, dims.n_embd)
    assert shape.head_dim_k * shape.n_heads == shape.n_embd


@pytest.mark.parametrize("gib", [1, 2, 6, 12, 40])
def test_a_wished_size_is_met_within_a_tenth(gib: int, tmp_path: Path) -> None:
    wanted = gib << 30
    dims = llama_dims_for_size(wanted, "q4_k")
    (path,) = write_llama(
        tmp_path / "m.gguf",
        n_layers=dims.n_layers,
        n_embd=dims.n_embd,
        n_ff=dims.n_ff,
        n_heads=dims.n_heads,
        n_heads_kv=dims.n_heads_kv,
        n_vocab=dims.n_vocab,
        quant="q4_k",
        sparse=True,
    )
    assert abs(path.stat().st_size - wanted) < wanted / 10


def test_the_command_line_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert main(["llama", str(out), "--size", "1M", "--quant", "q4_0"]) == 0
    assert main(["moe", str(tmp_path / "e.gguf"), "--n-experts", "4", "--split", "2"]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert str(tmp_path / "e-00002-of-00002.gguf") in printed
    assert open_gguf(tmp_path / "e-00001-of-00002.gguf").shape.n_experts == 4
