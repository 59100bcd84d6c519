"""`nexus convert` of a folder: llama.cpp loads what comes out, and quantizes on the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from nexus_ext.formats.hf import HfConversion
from nexus_ext.runtime.hf import HfOptions, convert_hf
from nexus_ext.runtime.quantize import BASES, TERNARY, UNAIDED, QuantizationFailed
from tests.cli_support import call
from tests.synth.hf import (
    LINEAR,
    NAMES,
    HfDims,
    weights_of,
    write_bpe,
    write_hf,
    write_json,
)

WIDE = HfDims(n_layers=1, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, head_dim=64)


def vocabulary(path: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["spm", "spm-json"])
def test_llama_cpp_tokenizes_by_sentencepiece(tmp_path: Path, kind: str) -> None:
    write_hf(tmp_path / "m", tokenizer=kind)
    assert call("convert", tmp_path / "m", tmp_path / "m.gguf", "-q").status == 0
    llm = vocabulary(tmp_path / "m.gguf")
    ids = {
        text.decode(): i
        for i, text in enumerate(
            HfConversion(tmp_path / "m").tokenizer.pairs["tokenizer.ggml.tokens"]
        )
    }  # type: ignore[arg-type, union-attr, misc]
    assert llm.tokenize(b"hello the") == [ids["<s>"], ids["▁hello"], ids["▁the"]]
    assert llm.tokenize(b"he!", add_bos=False) == [ids["▁he"], ids["<0x21>"]]
    assert llm.detokenize(llm.tokenize("hello ünï".encode())) == "hello ünï".encode()
    llm.close()


def test_llama_cpp_tokenizes_by_byte_level_bpe(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "qwen2", tokenizer="bpe", chat_template=None)
    assert call("convert", tmp_path / "m", tmp_path / "m.gguf", "-q").status == 0
    llm = vocabulary(tmp_path / "m.gguf")
    pieces = [
        llm.detokenize([t], special=True)
        for t in llm.tokenize(b"hello the 12<|im_end|><tool_call>", special=True)
    ]
    assert pieces == [b"hello", b" the", b" ", b"1", b"2", b"<|im_end|>", b"<tool_call>"]
    assert llm.token_eos() == llm.tokenize(b"<|im_end|>", special=True)[0]
    llm.close()


@pytest.mark.parametrize("type_name", ["q8_0", "q4_k_m", "iq4_xs"])
def test_quantized_on_the_way(tmp_path: Path, type_name: str) -> None:
    weights = write_hf(tmp_path / "m", "qwen3", dims=WIDE, dtype="BF16")
    out = tmp_path / "m.gguf"
    done = call(
        "convert", tmp_path / "m", out, "--type", type_name, "--json", "--threads", "1", "--tensors"
    )
    assert done.status == 0 and done.json["type_name"] == type_name.upper()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"]
    found = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert {t["name"]: t["written"] for t in done.json["tensors"]} == types(out)
    up = found["blk.0.ffn_up.weight"]
    values = dequantize(up.data, up.tensor_type)
    wanted = weights["model.layers.0.mlp.up_proj.weight"]
    error = np.abs(values - wanted).mean() / np.abs(wanted).mean()
    assert up.tensor_type.name == type_name.upper().removesuffix("_M")
    assert 0 < error < {"q8_0": 0.01}.get(type_name, 0.1)


@pytest.mark.parametrize("type_name", ["tq2_0", "tq1_0"])
def test_a_ternary_model_is_kept_exactly(tmp_path: Path, type_name: str) -> None:
    """Ternary types hold three values a block: exact up to their 16-bit scale."""
    rng = np.random.default_rng(0)
    weights = weights_of("bitnet", WIDE)
    for name, array in weights.items():
        if name.endswith(tuple(f"{part}.weight" for part in LINEAR)):
            weights[name] = rng.integers(-1, 2, array.shape).astype(np.float32) * np.float32(0.25)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    write_hf(tmp_path / "m", "bitnet", dims=WIDE, weights=weights, quantization_config=quantization)
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf", "--type", type_name)
    assert done.status == 0 and "loses everything" not in done.err
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            values = dequantize(tensor.data, tensor.tensor_type)
            assert tensor.tensor_type.name == type_name.upper()
            assert np.array_equal(values, weights["model.layers.0.mlp.down_proj.weight"])


def test_rows_that_ternary_types_cannot_hold_are_said_not_to_be_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = weights_of("bitnet")
    for name, array in weights.items():
        if name.endswith(tuple(f"{part}.weight" for part in LINEAR)):
            weights[name] = rng.integers(-1, 2, array.shape).astype(np.float32) * np.float32(0.25)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    write_hf(tmp_path / "m", "bitnet", weights=weights, quantization_config=quantization)
    done = call("convert", tmp_path / "m", tmp_path / "t.gguf", "--type", "tq2_0")
    assert done.status == 0 and "no longer exact: q8_0 would keep them" in done.err
    wanted = weights["model.layers.0.self_attn.q_proj.weight"]
    error = {}
    assert call("convert", tmp_path / "m", tmp_path / "q.gguf", "--type", "q8_0").status == 0
    for name in ("t", "q"):
        for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors:
            if tensor.name == "blk.0.attn_q.weight":
                values = dequantize(tensor.data, tensor.tensor_type)
                error[name] = float(np.abs(values - wanted).max() / 0.25)
    assert error["q"] < 2e-3 < 0.1 < error["t"]


def test_what_ternary_types_do_to_other_models_is_said(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", dims=WIDE)
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf", "--type", "TQ2_0")
    assert "not trained ternary loses everything it has learned" in done.err
    write_hf(tmp_path / "n")
    done = call("convert", tmp_path / "n", tmp_path / "n.gguf", "--type", "q4_k_m")
    assert "rows that do not fill the blocks of q4_k_m" in done.err


@pytest.mark.parametrize("arch", NAMES)
def test_llama_cpp_computes_with_every_architecture(tmp_path: Path, arch: str) -> None:
    import llama_cpp

    write_hf(tmp_path / "m", arch)
    HfConversion(tmp_path / "m").write(tmp_path / "m.gguf")
    llm = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=16, logits_all=True, verbose=False)
    llm.eval([1, 300, 5, 7])
    logits = np.array(llm.scores[:4])
    assert np.isfinite(logits).all() and (logits.std(axis=1) > 0.1).all()
    llm.close()


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "mistral", dtype="BF16", sliding_window=64)
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf", "--name", "My model")
    assert done.status == 0
    for text in ("llama", "SentencePiece from tokenizer.model", "BF16, 21 tensors"):
        assert text in done.out
    assert "slides over 64 tokens" in done.err
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field("general.name")
    assert field is not None and field.contents() == "My model"
    before = (tmp_path / "m.gguf").read_bytes()
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf")
    assert done.status == 2 and "exists already" in done.err and "--force" in done.err
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf", "--type", "q8_0")
    assert done.status == 2 and (tmp_path / "m.gguf").read_bytes() == before
    assert call("convert", tmp_path / "m", tmp_path / "m.gguf", "--force").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "m.gguf"], "nothing"),
        (["m", "m.bin"], "the ending does not say"),
        (["m", "m.gguf", "--type", "q9"], "--type is 'q9'"),
        (["m", "m.gguf", "--type", "iq2_xxs"], "--type is 'iq2_xxs'"),
        (["m", "m.gguf", "--pre", "qwen2"], "which has no pre-tokenizer"),
        (["m", "no/m.gguf"], "does not exist"),
        (["m.safetensors", "m.gguf", "--type", "f32"], "--type is for folders"),
    ],
)
def test_command_lines_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(tmp_path / "m")
    done = call("convert", *arguments)
    assert done.status in (1, 2) and message in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_becomes_an_nxf_of_the_same_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "qwen3", dtype="BF16")
    assert call("convert", tmp_path / "m", tmp_path / "m.gguf", "-q").status == 0
    done = call("convert", tmp_path / "m", tmp_path / "m.nxf")
    assert done.status == 0 and "m.nxf" not in done.err
    assert call("convert", tmp_path / "m.nxf", tmp_path / "back.gguf", "-q").status == 0
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    names = ["back.gguf", "m", "m.gguf", "m.nxf"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert call("convert", tmp_path / "m", tmp_path / "m.nxf").status == 2
    assert call("convert", tmp_path / "m", tmp_path / "q.nxf", "--type", "q8_0").status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "q.nxf"]


def test_a_pretokenizer_can_be_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "qwen2", tokenizer="bpe")
    write_bpe(tmp_path / "m", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})
    done = call("convert", tmp_path / "m", tmp_path / "m.gguf")
    assert done.status == 1 and "--pre" in done.err
    assert call("convert", tmp_path / "m", tmp_path / "m.gguf", "--pre", "gpt-2").status == 0


# -- the quantizer --------------------------------------------------------------------------------


def test_an_interrupt_ends_the_quantizer_and_removes_what_it_wrote(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", dims=WIDE)
    seen: list[tuple[int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing":
            seen.append((done, total))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf(
            str(tmp_path / "m"), str(tmp_path / "q.gguf"), HfOptions(type_name="q8_0"), interrupt
        )
    assert 0 < seen[0][0] < seen[0][1]
    assert os.listdir(tmp_path) == ["m"]


def test_every_type_that_is_offered_is_one_of_llama_cpp() -> None:
    import llama_cpp

    for name in BASES:
        assert hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}"), name
    assert set(UNAIDED) < set(BASES) and set(TERNARY) < set(UNAIDED)


@pytest.mark.parametrize("type_name", ["iq3_s", "iq3_m", "q2_k", "tq1_0"])
def test_small_types_that_are_offered_need_no_importance_matrix(
    tmp_path: Path, type_name: str
) -> None:
    write_hf(tmp_path / "m", dims=WIDE)
    options = HfOptions(type_name=type_name, n_threads=2)
    report = convert_hf(str(tmp_path / "m"), str(tmp_path / "q.gguf"), options)
    assert report.nbytes == os.path.getsize(tmp_path / "q.gguf")


def test_nothing_is_left_when_quantizing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise QuantizationFailed("no")

    write_hf(tmp_path / "m")
    write_json(tmp_path / "m" / "generation_config.json", {"eos_token_id": 2})
    monkeypatch.setattr("nexus_ext.runtime.hf.quantize", fail)
    assert call("convert", tmp_path / "m", tmp_path / "q.gguf", "--type", "q8_0").status == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
