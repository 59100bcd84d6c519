"""Folders that are incomplete, hostile, or of a model that llama.cpp computes otherwise."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.hf import HfConversion
from tests.synth.hf import HfDims, change_json, config_of, weights_of, write_hf, write_json


def refused(folder: Path, message: str) -> FormatError:
    with pytest.raises(FormatError, match=message) as info:
        HfConversion(folder)
    return info.value


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"architectures": None}, "'architectures' is None, not a list of one name"),
        ("llama", {"architectures": ["A", "B"]}, "not a list of one name"),
        ("llama", {"architectures": [3]}, "not a list of one name"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "names 'GPT2LMHeadModel', which is not"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("llama", {"hidden_size": "32"}, "'hidden_size' is '32', not an integer from 1"),
        ("llama", {"hidden_size": 32.0}, "not an integer"),
        ("llama", {"hidden_size": True}, "not an integer"),
        ("llama", {"num_hidden_layers": 10**12}, "not an integer from 1 to 512"),
        ("llama", {"vocab_size": 1 << 40}, "'vocab_size' is 1099511627776"),
        ("llama", {"num_attention_heads": 0}, "'num_attention_heads' is 0"),
        ("llama", {"num_attention_heads": 6, "head_dim": None}, "a divisor of the 32 embedding"),
        ("llama", {"num_key_value_heads": 3}, "'num_key_value_heads' is 3, not a divisor of 4"),
        ("llama", {"head_dim": 7}, "'head_dim' is 7, not even"),
        ("qwen2", {"head_dim": 16}, "4 heads of 16 do not make an embedding of 32"),
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; llama.cpp's llama computes"),
        ("bitnet", {"hidden_act": "relu2"}, "'hidden_act' is 'relu2'"),
        ("llama", {"max_position_embeddings": None}, "'max_position_embeddings' is missing"),
        ("llama", {"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small', not a number"),
        ("llama", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ("llama", {"rope_theta": float("inf")}, "'rope_theta' is inf"),
        ("llama", {"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no', not true"),
        ("llama", {"partial_rotary_factor": 0.5}, "not 1, which llama.cpp assumes"),
        ("llama", {"rope_scaling": []}, "'rope_scaling' is a list, not an object"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope' is not in"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0}},
            "'mscale' of rope scaling",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "llama3", "factor": 2}},
            "'llama3' is not in llama.cpp's qwen2",
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            "above the 'low_freq_factor' 4",
        ),
        ("mixtral", {"num_local_experts": None}, "'num_experts' is missing"),
        ("mixtral", {"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9, not an integer"),
        ("qwen3moe", {"norm_topk_prob": False}, "'norm_topk_prob' is false"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "make some layers dense"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "make some layers dense"),
        ("bitnet", {"tie_word_embeddings": False}, "'tie_word_embeddings' is false"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ("llama", {"quantization_config": {"quant_method": 3}}, "quant_method' is 3, not a text"),
        (
            "bitnet",
            {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}},
            "adds norms",
        ),
        (
            "bitnet",
            {"quantization_config": {"quant_method": "bitnet", "linear_class": "other"}},
            "the linear class 'other'",
        ),
    ],
)
def test_configurations(tmp_path: Path, arch: str, changes: dict[str, Any], message: str) -> None:
    write_hf(tmp_path / "m", arch)
    change_json(tmp_path / "m" / "config.json", **changes)
    error = refused(tmp_path / "m", message)
    assert str(tmp_path / "m" / "config.json") in str(error)


Change = Callable[[dict[str, Any]], object]


def rename(old: str, new: str) -> Change:
    return lambda weights: weights.update({new: weights.pop(old)})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("llama", lambda w: w.pop(Q), rf"becomes 'blk.1.attn_q.weight'; '{Q}' is missing"),
        ("llama", lambda w: w.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (
            "llama",
            lambda w: w.update({Q: w[Q][:-1]}),
            r"'model.layers.1.*' has the shape \[31, 32\]",
        ),
        ("llama", lambda w: w.update({Q: w[Q].astype(np.uint8)}), "has the dtype U8"),
        (
            "llama",
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": np.zeros(2, np.float32)}),
            r"'model.layers.9.mlp.up_proj.weight' \[2\] has no place",
        ),
        (
            "llama",
            lambda w: w.update({"vision.weight": np.zeros(2, np.float32), "a.b": w[Q]}),
            "'a.b' .* has no place in llama.cpp's llama, nor have 1 others",
        ),
        ("llama", lambda w: w.update({"layers.1.attention.wq.weight": w[Q]}), "both become"),
        (
            "qwen3",
            lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(32, np.float32)}),
            "o_proj.bias.* has no place in llama.cpp's qwen3",
        ),
        (
            "qwen2",
            lambda w: w.pop("model.layers.0.self_attn.k_proj.bias"),
            "k_proj.bias' is missing",
        ),
        (
            "mixtral",
            lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            "'blk.1.ffn_up_exps.weight' is made of 4 experts by config.json, number 2 is missing",
        ),
        (
            "mixtral",
            lambda w: w.update(
                {"model.layers.1.block_sparse_moe.experts.4.w3.weight": np.zeros(1, np.float32)}
            ),
            "is made of 4 experts by config.json, 5 are there",
        ),
        (
            "llama",
            rename(
                "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"
            ),
            "has no place|is missing",
        ),
    ],
)
def test_weights(tmp_path: Path, arch: str, change: Change, message: str) -> None:
    weights: dict[str, Any] = dict(weights_of(arch))
    change(weights)
    write_hf(tmp_path / "m", arch, weights=weights)
    assert str(tmp_path / "m") in str(refused(tmp_path / "m", message))


def test_attention_bias_that_is_announced_must_be_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", attention_bias=True)
    refused(tmp_path / "m", "'model.layers.0.self_attn.q_proj.bias' is missing")
    write_hf(tmp_path / "n", mlp_bias=True)
    refused(tmp_path / "n", "'model.layers.0.mlp.gate_proj.bias' is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, n: w.update({n: np.full((8, 32), 0xFF, np.uint8)}), "holds the code 3"),
        (lambda w, n: w.update({n: w[n][:-1]}), r"has the shape \[7, 32\]"),
        (lambda w, n: w.pop(f"{n}_scale"), "the scale of the ternary tensor"),
        (lambda w, n: w.update({f"{n}_scale": np.ones(2, np.float32)}), "is not one number"),
        (lambda w, n: w.update({f"{n}_scale": np.zeros(1, np.float32)}), "_scale' is 0"),
        (
            lambda w, n: w.update({"x.weight_scale": np.zeros(1, np.float32)}),
            "'x.weight_scale' .* has no place",
        ),
    ],
)
def test_packed_weights(
    tmp_path: Path, change: Callable[[dict[str, Any], str], object], message: str
) -> None:
    weights: dict[str, Any] = dict(weights_of("bitnet"))
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = np.zeros((8, 32), np.uint8)
    weights[f"{name}_scale"] = np.ones(1, np.float32)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    change(weights, name)
    write_hf(tmp_path / "m", "bitnet", weights=weights, quantization_config=quantization)
    with pytest.raises(FormatError, match=message):
        HfConversion(tmp_path / "m").write(tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_rows_that_cannot_have_been_packed(tmp_path: Path) -> None:
    dims = HfDims(n_ff=50)
    weights: dict[str, Any] = dict(weights_of("bitnet", dims))
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((12, 32), np.uint8)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    write_hf(tmp_path / "m", "bitnet", dims=dims, weights=weights, quantization_config=quantization)
    refused(tmp_path / "m", "the 50 rows of .* are not packed")


# -- files ----------------------------------------------------------------------------------------


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: is missing")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "no valid JSON"),
        (b"[1]", "is a list, not an object"),
        (b'{"a": "\xff"}', "no valid JSON"),
        (b'{"a": "\\ud800"}', "no valid JSON"),
        (b"[" * 200_000, "nested too deeply|no valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_that_are_no_json(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    write_hf(tmp_path / "m", tokenizer="bpe")
    (tmp_path / "m" / name).write_bytes(data)
    assert name in str(refused(tmp_path / "m", message))


def test_files_that_are_too_large_or_no_files_are_not_read(tmp_path: Path) -> None:
    write_hf(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    os.truncate(path, 1 << 40)
    refused(tmp_path / "m", "takes 1099511627776 bytes, the limit is")
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path / "m", "is not a regular file")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    write_hf(tmp_path / "m")
    monkeypatch.setattr("nexus_ext.formats.hf.folder.open", denied, raising=False)
    with pytest.raises(ReadFailed, match=r"config.json: cannot be read: Permission") as info:
        HfConversion(tmp_path / "m")
    assert info.value.errno == errno.EACCES


def test_weights_in_other_formats_are_not_read(tmp_path: Path) -> None:
    write_hf(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    error = refused(tmp_path / "m", r"has neither model.safetensors nor .*, only pytorch_model.bin")
    assert "a pickle could run code" in error.hint


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write_hf(folder, shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    write_json(path, index)
    return folder


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    last = "model-00003-of-00003.safetensors"
    folder = _index(tmp_path / "a", lambda placed: None)
    (folder / last).unlink()
    refused(folder, f"1 of 3 shards are missing, the first is {last}")
    folder = _index(tmp_path / "b", lambda placed: placed.update({"new.weight": last}))
    refused(folder, "says that 'new.weight' is in")
    for number, bad in enumerate(("../x.safetensors", "/etc/passwd", "", 3, None)):
        folder = _index(tmp_path / f"c{number}", lambda placed, bad=bad: placed.update({"x": bad}))
        refused(folder, r"weight_map\['x'\].* is .*, not the name of a file")
    folder = _index(tmp_path / "d", lambda placed: placed.clear())
    refused(folder, "a map to 1 to 10000 files")
    folder = _index(tmp_path / "e", lambda placed: placed.update({"x": "copy.safetensors"}))
    (folder / "copy.safetensors").write_bytes((folder / last).read_bytes())
    refused(folder, "is already in")
    write_json(folder / "model.safetensors.index.json", {"weight_map": []})
    refused(folder, "'weight_map' is a list, not an object")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "m")
    write_json(tmp_path / "m" / "config.json", config_of("llama") | {"num_hidden_layers": 3})
    refused(tmp_path / "m", "no tensor becomes 'blk.2.attn_norm.weight'")
