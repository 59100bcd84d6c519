"""Tensors of a model as safetensors: the values that the gguf package decodes, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from safetensors.numpy import load_file

from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats import export
from nexus_ext.formats.export import export_tensors
from nexus_ext.testing.synthetic import Tensor, write_gguf, write_llama, write_moe
from tests.cli_support import call
from tests.models_folder import find_model

MODELS = (
    "stories260K-f32.gguf",
    "stories260K-q4_0.gguf",
    "bitllama-3M-q4_k_m.gguf",
    "bitllama-3M-tq1_0.gguf",
    "bitllama-3M-tq2_0.gguf",
    "bitllama-3M-q8_0.gguf",
)


@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_the_one_that_gguf_decodes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small pieces, so that these small models are put together from many.
    monkeypatch.setattr(export, "_PIECE_ELEMENTS", 1000)
    model = find_model(name)
    export_tensors(model, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    tensors = gguf.GGUFReader(model).tensors
    assert loaded.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        wanted = dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(extent) for extent in tensor.shape[::-1])
        assert loaded[tensor.name].dtype == np.float32
        assert np.array_equal(loaded[tensor.name], wanted.reshape(shape)), tensor.name


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q5_K", "IQ4_XS", "MXFP4"])
def test_experts_have_three_dimensions(tmp_path: Path, kind: str) -> None:
    (model,) = write_moe(tmp_path / "m.gguf", quant="Q8_0", expert_quant=kind)
    done = call("export", model, tmp_path / "x.safetensors", "--tensors", "_exps", "--json")
    assert done.status == 0
    loaded = load_file(tmp_path / "x.safetensors")
    found = {t.name: t for t in gguf.GGUFReader(model).tensors if "_exps" in t.name}
    assert loaded.keys() == found.keys() == {t["name"] for t in done.json["tensors"]}
    for name, tensor in found.items():
        wanted = dequantize(tensor.data, tensor.tensor_type)
        assert loaded[name].ndim == 3
        assert np.array_equal(loaded[name].reshape(-1), wanted.reshape(-1)), name


def test_from_an_nxf_and_from_parts_as_from_the_gguf(tmp_path: Path) -> None:
    model = find_model("bitllama-3M-q4_k_m.gguf")
    assert call("convert", model, tmp_path / "m.nxf", "-q").status == 0
    for source, target in ((model, "a"), (tmp_path / "m.nxf", "b")):
        pattern = r"^blk\.[13]\.(attn_q|ffn_down)"
        done = call("export", source, tmp_path / target, "--tensors", pattern)
        assert done.status == 0 and "4 tensors" in done.out
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert sorted(a) == sorted(b) and len(a) == 4
    assert all(np.array_equal(a[name], b[name]) for name in a)
    dims = {"n_layers": 2, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 300}
    whole = write_llama(tmp_path / "w.gguf", **dims)[0]
    parts = write_llama(tmp_path / "p.gguf", split=3, **dims)
    export_tensors(whole, tmp_path / "w")
    export_tensors(parts[1], tmp_path / "p")
    w, p = load_file(tmp_path / "w"), load_file(tmp_path / "p")
    assert all(np.array_equal(w[name], p[name]) for name in w)


def test_integers_are_kept(tmp_path: Path) -> None:
    (path,) = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "llama"}, [Tensor("a", (5,))]
    )
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<I", 1) + struct.pack("<Q", 5)) + 12
    data[at : at + 4] = struct.pack("<I", 26)  # I32
    data[-32:-12] = struct.pack("<5i", 1, -2, 3, -4, 5)
    path.write_bytes(data)
    export_tensors(path, tmp_path / "x")
    loaded = load_file(tmp_path / "x")["a"]
    assert loaded.dtype == np.int32 and loaded.tolist() == [1, -2, 3, -4, 5]


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    tensors = [Tensor("token_embd.weight", (4096, 4096), "Q8_0")]
    (path,) = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors, sparse=True
    )
    tracemalloc.start()
    (out,) = export_tensors(path, tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.nbytes == 64 << 20 and peak < 32 << 20


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path: Path) -> None:
    model = find_model("stories260K-q4_0.gguf")
    for pattern, message in (("(", "regular expression"), ("nothing", "no name of its")):
        with pytest.raises(UsageError, match=message):
            export_tensors(model, tmp_path / "x", pattern)
    (path,) = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "llama"}, [Tensor("a", (32,), "Q8_0")]
    )
    data = path.read_bytes().replace(struct.pack("<QI", 32, 8), struct.pack("<QI", 32, 9))
    path.write_bytes(data + bytes(64))  # Q8_1, which the gguf package does not decode
    with pytest.raises(FormatError, match="is of the type Q8_1, which the gguf package cannot"):
        export_tensors(path, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    (tmp_path / "x").write_bytes(b"mine")
    done = call("export", model, tmp_path / "x")
    assert done.status == 2 and "--force" in done.err
    assert call("export", model, tmp_path / "x", "--force").status == 0
    assert len(load_file(tmp_path / "x")) > 10
