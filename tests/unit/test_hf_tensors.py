"""Folders of the hub become GGUF files whose every value is the one that llama.cpp needs."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.hf import HfConversion
from tests.models_folder import find_model
from tests.synth.hf import (
    LINEAR,
    NAMES,
    Floats,
    HfDims,
    change_json,
    rounded,
    spm_bytes,
    weights_of,
    write_hf,
    write_json,
    write_safetensors,
)

DIMS = HfDims()


def convert(folder: Path, out: Path, **options: Any) -> dict[str, Floats]:
    """Convert and return every tensor in float32, read by the gguf package."""
    HfConversion(folder, **options).write(out)
    tensors = {}
    for tensor in gguf.GGUFReader(out).tensors:
        shape = tuple(int(extent) for extent in tensor.shape[::-1])
        tensors[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return tensors


def value_of(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def neighbours(rows: Floats, head_dim: int) -> Floats:
    """Put the rows that PyTorch rotates together beside each other, one by one."""
    out = np.empty_like(rows)
    half = head_dim // 2
    for start in range(0, len(rows), head_dim):
        for i in range(half):
            out[start + 2 * i] = rows[start + i]
            out[start + 2 * i + 1] = rows[start + half + i]
    return out


def expected(arch: str, weights: dict[str, Floats], dims: HfDims = DIMS) -> dict[str, Floats]:
    """The tensors by their GGUF names, spelled out without the gguf package's map."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.attn_sub_norm": "attn_sub_norm",
        "mlp.ffn_sub_norm": "ffn_sub_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "block_sparse_moe.gate": "ffn_gate_inp",
        "mlp.gate": "ffn_gate_inp",
    }
    roots = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {"w1": "gate", "w2": "down", "w3": "up"}
    out: dict[str, Floats] = {}
    experts: dict[str, list[Floats]] = {}
    for name, array in weights.items():
        if name in roots:
            out[roots[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, suffix = rest.rsplit(".", 1)
        if ".experts." in stem:
            part = stem.rsplit(".", 1)[1]
            part = parts.get(part, part.removesuffix("_proj"))
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(array)
            continue
        if arch in ("llama", "mistral", "mixtral") and stem[-6:] in ("q_proj", "k_proj"):
            array = neighbours(array, dims.head_dim)
        out[f"blk.{layer}.{names[stem]}.{suffix}"] = array
    return out | {name: np.stack(arrays) for name, arrays in experts.items()}


def assert_equal(found: dict[str, Floats], wanted: dict[str, Floats]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("arch", NAMES)
def test_every_value_of_every_architecture(tmp_path: Path, arch: str) -> None:
    weights = write_hf(tmp_path / "m", arch)
    out = tmp_path / "m.gguf"
    assert_equal(convert(tmp_path / "m", out), expected(arch, weights))
    name = {"mistral": "llama", "mixtral": "llama"}.get(arch, arch)
    for key, value in {
        "general.architecture": name,
        "general.name": "m",
        "general.file_type": 0,
        f"{name}.block_count": 2,
        f"{name}.context_length": 128,
        f"{name}.embedding_length": 32,
        f"{name}.feed_forward_length": 48,
        f"{name}.attention.head_count": 4,
        f"{name}.attention.head_count_kv": 2,
        f"{name}.attention.key_length": 8,
        f"{name}.attention.value_length": 8,
        f"{name}.rope.dimension_count": 8,
        f"{name}.rope.freq_base": 10000.0,
        f"{name}.vocab_size": 320,
        f"{name}.expert_count": 4 if "moe" in arch or arch == "mixtral" else None,
        f"{name}.expert_used_count": 2 if "moe" in arch or arch == "mixtral" else None,
        f"{name}.expert_feed_forward_length": 48 if arch == "qwen3moe" else None,
    }.items():
        assert value_of(out, key) == value, key
    assert value_of(out, f"{name}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    catalog = open_gguf(out)  # our own reader accepts it as well
    assert catalog.shape.n_layers == 2 and catalog.shape.n_vocab == 320


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("written", ["auto", "f32", "f16", "bf16"])
def test_types_of_weights(tmp_path: Path, stored: str, written: str) -> None:
    weights = write_hf(tmp_path / "m", "qwen3", dtype=stored)
    out = tmp_path / "m.gguf"
    found = convert(tmp_path / "m", out, float_type=written)
    kind = stored if written == "auto" else written.upper()
    types = {tensor.name: tensor.type_name for tensor in open_gguf(out).tensors}
    assert types["blk.1.ffn_up.weight"] == types["output.weight"] == kind
    assert types["blk.1.attn_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    assert value_of(out, "general.file_type") == {"F32": 0, "F16": 1, "BF16": 32}[kind]
    for name, array in expected("qwen3", weights).items():
        if types[name] == "F16":
            array = rounded(array, "F16")
        step = 2.0**-8 if types[name] == "BF16" and stored != "BF16" else 0.0
        assert np.allclose(found[name], array, rtol=step, atol=0), name


def test_weights_of_several_types_keep_them(tmp_path: Path) -> None:
    weights = write_hf(tmp_path / "m", "mixtral", dtype="BF16")
    given = weights_of("mixtral")
    exact = "model.layers.1.self_attn.v_proj.weight"  # F32 among BF16
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"  # F16: its tensor becomes F32
    parts = {"a": ([exact], "F32"), "b": ([expert], "F16")}
    rest = [name for name in given if name not in (exact, expert)]
    placed = {}
    for part, (names, dtype) in {**parts, "c": (rest, "BF16")}.items():
        file = f"{part}.safetensors"
        write_safetensors(tmp_path / "m" / file, {n: given[n] for n in names}, dtype)
        placed.update(dict.fromkeys(names, file))
    (tmp_path / "m" / "model.safetensors").unlink()
    write_json(tmp_path / "m" / "model.safetensors.index.json", {"weight_map": placed})
    weights |= {exact: given[exact], expert: rounded(given[expert], "F16")}
    out = tmp_path / "m.gguf"
    assert_equal(convert(tmp_path / "m", out), expected("mixtral", weights))
    types = {tensor.name: tensor.type_name for tensor in open_gguf(out).tensors}
    assert types["blk.1.attn_v.weight"] == types["blk.0.ffn_down_exps.weight"] == "F32"
    assert types["blk.0.attn_v.weight"] == types["blk.1.ffn_down_exps.weight"] == "BF16"
    assert value_of(out, "general.file_type") == 32


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    weights = write_hf(tmp_path / "m", "mixtral", shards=5)
    found = convert(tmp_path / "m", tmp_path / "m.gguf")
    assert_equal(found, expected("mixtral", weights))


def test_biases_of_queries_and_keys_change_places_as_their_weights_do(tmp_path: Path) -> None:
    given = weights_of("llama", bias=True)
    weights = write_hf(tmp_path / "m", weights=given, attention_bias=True)
    found = convert(tmp_path / "m", tmp_path / "m.gguf")
    assert_equal(found, expected("llama", weights))
    assert "blk.1.attn_output.bias" in found


@pytest.mark.parametrize("copy", [False, True])
def test_a_tied_head_is_written_once(tmp_path: Path, copy: bool) -> None:
    given = weights_of("qwen2", tied=True)
    wanted = expected("qwen2", dict(given))
    if copy:
        given["lm_head.weight"] = given["model.embed_tokens.weight"]
    write_hf(tmp_path / "m", "qwen2", weights=given, tie_word_embeddings=True)
    found = convert(tmp_path / "m", tmp_path / "m.gguf")
    assert_equal(found, wanted)


def test_experts_in_one_tensor_are_taken_apart(tmp_path: Path) -> None:
    given = weights_of("qwen3moe")
    wanted = expected("qwen3moe", dict(given))
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: np.stack([given.pop(f"{prefix}.{e}.{part}.weight") for e in range(4)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        given[f"{prefix}.gate_up_proj"] = np.concatenate(
            [parts["gate_proj"], parts["up_proj"]], axis=1
        )
        given[f"{prefix}.down_proj"] = parts["down_proj"]
    write_hf(tmp_path / "m", "qwen3moe", weights=given)
    assert_equal(convert(tmp_path / "m", tmp_path / "m.gguf"), wanted)


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    given = weights_of("llama")
    wanted = expected("llama", dict(given))
    given["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_hf(tmp_path / "m", weights=given)
    assert_equal(convert(tmp_path / "m", tmp_path / "m.gguf"), wanted)


# -- rotary embedding -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama3_scaling_becomes_a_tensor(tmp_path: Path, key: str) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = scaling | {"rope_theta": 500000.0} if key == "rope_parameters" else scaling
    dims = HfDims(head_dim=128, n_heads=1, n_heads_kv=1)
    write_hf(tmp_path / "m", dims=dims, rope_theta=500000.0, **{key: rope})
    out = tmp_path / "m.gguf"
    factors = convert(tmp_path / "m", out)["rope_freqs.weight"]
    # Computed by transformers 5.24 for these settings, those of Llama 3.1 8B.
    middle = [1.2074838876724243, 1.5534145832061768, 2.026313066482544]
    middle += [2.6945302486419678, 3.684253454208374, 5.257327079772949]
    assert np.allclose(factors, [1.0] * 29 + middle + [8.0] * 29, rtol=2e-6)
    assert value_of(out, "llama.rope.freq_base") == 500000.0
    assert value_of(out, "llama.rope.scaling.type") is None


def test_linear_and_yarn_become_keys(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", rope_scaling={"type": "linear", "factor": 4.0})
    convert(tmp_path / "a", tmp_path / "a.gguf")
    assert value_of(tmp_path / "a.gguf", "llama.rope.scaling.type") == "linear"
    assert value_of(tmp_path / "a.gguf", "llama.rope.scaling.factor") == 4.0
    usual = 0.1 * math.log(4.0) + 1
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"attention_factor": 2 * usual, "beta_fast": 16, "rope_theta": 1e6}
    write_hf(tmp_path / "b", "qwen2", rope_parameters=rope)
    convert(tmp_path / "b", tmp_path / "b.gguf")
    for key, value in {
        gguf.Keys.Rope.SCALING_TYPE: "yarn",
        gguf.Keys.Rope.SCALING_FACTOR: 4.0,
        gguf.Keys.Rope.SCALING_ORIG_CTX_LEN: 32,
        gguf.Keys.Rope.SCALING_ATTN_FACTOR: pytest.approx(2.0),
        gguf.Keys.Rope.SCALING_YARN_BETA_FAST: 16.0,
        gguf.Keys.Rope.SCALING_YARN_BETA_SLOW: 1.0,
        gguf.Keys.Rope.FREQ_BASE: 1e6,
    }.items():
        assert value_of(tmp_path / "b.gguf", key.format(arch="qwen2")) == value, key


def test_what_differs_in_use_is_said(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", rope_scaling={"type": "dynamic", "factor": 2.0})
    (note,) = HfConversion(tmp_path / "a").report.notes
    assert "dynamic" in note and "128 tokens" in note
    write_hf(tmp_path / "b", "mistral", sliding_window=64)
    (note,) = HfConversion(tmp_path / "b").report.notes
    assert "slides over 64 tokens" in note
    write_hf(tmp_path / "c", "mistral", sliding_window=128)
    write_hf(tmp_path / "d", "qwen2", sliding_window=64, use_sliding_window=False)
    assert not HfConversion(tmp_path / "c").report.notes
    assert not HfConversion(tmp_path / "d").report.notes


# -- ternary models -------------------------------------------------------------------------------


def pack(signs: Floats) -> np.ndarray[Any, Any]:
    """Pack -1, 0, 1 as transformers does, one weight at a time."""
    quarter = len(signs) // 4
    packed = np.zeros((quarter, signs.shape[1]), np.uint8)
    for row in range(len(signs)):
        codes = (signs[row] + 1).astype(np.uint8)
        packed[row % quarter] |= codes << np.uint8(2 * (row // quarter))
    return packed


@pytest.mark.parametrize(
    ("arch", "linear_class"),
    [("bitnet", "autobitlinear"), ("llama", "bitlinear"), ("llama", "autobitlinear")],
)
def test_packed_ternary_weights(tmp_path: Path, arch: str, linear_class: str) -> None:
    rng = np.random.default_rng(1)
    stored: dict[str, Any] = {}
    meant: dict[str, Floats] = {}
    for name, array in weights_of(arch).items():
        if not name.endswith(tuple(f"{part}.weight" for part in LINEAR)):
            stored[name] = meant[name] = array
            continue
        signs = rng.integers(-1, 2, array.shape).astype(np.float32)
        scale = np.float32(rng.choice([0.5, 0.25, 4.0]))  # powers of two: exact both ways
        stored[name] = pack(signs)
        stored[name.replace(".weight", ".weight_scale")] = np.array([scale], np.float32)
        meant[name] = signs / scale if linear_class == "bitlinear" else signs * scale
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    write_hf(tmp_path / "m", arch, weights=stored, quantization_config=quantization)
    found = convert(tmp_path / "m", tmp_path / "m.gguf")
    assert_equal(found, expected(arch, meant))
    assert HfConversion(tmp_path / "m").report.ternary


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_weights_that_are_made_ternary_when_they_are_used(tmp_path: Path, dtype: str) -> None:
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    stored = write_hf(tmp_path / "m", "bitnet", dtype=dtype, quantization_config=quantization)
    found = convert(tmp_path / "m", tmp_path / "m.gguf")
    name = "blk.1.ffn_down.weight"
    source = stored["model.layers.1.mlp.down_proj.weight"]
    mean = np.abs(source).astype(np.float64).mean()
    signs = np.sign(source) * (np.abs(source) > mean / 2)
    near = np.abs(np.abs(source) / mean - 0.5) < 1e-5
    assert not near.any()
    assert np.array_equal(np.sign(found[name]), signs)
    (size,) = np.unique(np.abs(found[name][signs != 0]))
    assert size == pytest.approx(mean, rel=2**-8 if dtype == "BF16" else 1e-6)
    # Norms and the embedding are not touched.
    assert np.array_equal(found["token_embd.weight"], stored["model.embed_tokens.weight"])


def test_bitnet_without_a_mode_is_taken_as_it_is(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "bitnet")
    assert not HfConversion(tmp_path / "m").report.ternary
    # The first models bring code of their own, which makes weights ternary.
    change_json(tmp_path / "m" / "config.json", architectures=["BitnetForCausalLM"])
    assert HfConversion(tmp_path / "m").report.ternary


# -- a trained model there and back ---------------------------------------------------------------


def test_a_trained_model_taken_apart_and_converted_again_is_the_same(tmp_path: Path) -> None:
    source = find_model("stories260K-f32.gguf")
    reader = gguf.GGUFReader(source)
    read = {t.name: np.array(t.data) for t in reader.tensors}

    def key(name: str) -> Any:
        field = reader.get_field(name)
        assert field is not None
        return field.contents()

    heads, embd = key("llama.attention.head_count"), key("llama.embedding_length")
    half = embd // heads // 2
    hub = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    weights: dict[str, Floats] = {}
    for name, array in read.items():
        parts = name.split(".")
        if parts[0] != "blk":
            weights[f"{hub[parts[0]]}.weight"] = array
            continue
        if parts[2] in ("attn_q", "attn_k"):
            array = array.reshape(-1, half, 2, embd).transpose(0, 2, 1, 3).reshape(array.shape)
        weights[f"model.layers.{parts[1]}.{hub[parts[2]]}.weight"] = array
    tokens, scores = key("tokenizer.ggml.tokens"), key("tokenizer.ggml.scores")
    types = key("tokenizer.ggml.token_type")
    folder = tmp_path / "stories"
    write_hf(
        folder,
        weights=weights,
        hidden_size=embd,
        intermediate_size=key("llama.feed_forward_length"),
        num_hidden_layers=key("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("llama.attention.head_count_kv"),
        head_dim=embd // heads,
        vocab_size=len(tokens),
        tie_word_embeddings="output.weight" not in read,
    )
    pieces = list(zip(tokens, scores, types, strict=True))
    (folder / "tokenizer.model").write_bytes(spm_bytes(pieces))
    out = tmp_path / "stories.gguf"
    assert_equal(convert(folder, out), read)
    again = gguf.GGUFReader(out)
    for name in ("tokens", "scores", "token_type", "bos_token_id", "eos_token_id"):
        field = again.get_field(f"tokenizer.ggml.{name}")
        assert field is not None and field.contents() == key(f"tokenizer.ggml.{name}"), name


# -- memory and writing ---------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    dims = HfDims(n_layers=1, n_embd=1024, n_ff=16384, n_heads=8, n_heads_kv=8, head_dim=128)
    folder = tmp_path / "m"
    write_hf(folder, dims=dims, weights={"x": np.zeros(1, np.float32)})
    shapes = {name: array.shape for name, array in weights_of("llama", DIMS).items()}
    sizes = {32: 1024, 48: 16384, 320: 320, 16: 1024}
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        if ".layers.1." in name:
            continue
        big = [sizes[extent] for extent in shape]
        end = at + math.prod(big) * 2
        header[name] = {"dtype": "BF16", "shape": big, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)  # zeros that take no disk
    tracemalloc.start()
    report = HfConversion(folder, float_type="f32").write(tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.nbytes > 200 << 20
    assert peak < 64 << 20


def test_a_value_that_the_type_cannot_hold_stops_the_conversion_without_a_file(
    tmp_path: Path,
) -> None:
    weights = weights_of("llama")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_hf(tmp_path / "m", weights=weights)
    with pytest.raises(FormatError, match=r"'blk.1.ffn_up.weight' holds the value 1e\+06") as info:
        HfConversion(tmp_path / "m", float_type="f16").write(tmp_path / "m.gguf")
    assert "bf16" in info.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    HfConversion(tmp_path / "m", float_type="bf16").write(tmp_path / "m.gguf")


def test_progress_reaches_the_end_and_an_existing_file_is_kept(tmp_path: Path) -> None:
    write_hf(tmp_path / "m")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "m.gguf"
    report = HfConversion(tmp_path / "m").write(out, progress=lambda d, t: seen.append((d, t)))
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1] == report.nbytes
    assert out.stat().st_size == report.nbytes == sum(f.nbytes for f in open_gguf(out).files)
    with pytest.raises(UsageError, match="exists already"):
        HfConversion(tmp_path / "m").write(out)
    with pytest.raises(UsageError, match="the type is 'q9'"):
        HfConversion(tmp_path / "m", float_type="q9")


def test_a_second_file_is_not_taken_for_the_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "m")
    write_safetensors(tmp_path / "m" / "adapter.safetensors", {"x": np.zeros(3, np.float32)})
    write_json(tmp_path / "m" / "other.json", {})
    assert len(HfConversion(tmp_path / "m").report.tensors) == 21
