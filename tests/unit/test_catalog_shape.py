"""Hyperparameters are found for every architecture, and senseless ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ext.errors import FormatError
from nexus_ext.formats import open_gguf
from nexus_ext.testing.synthetic import Tensor, Typed, Value, write_gguf, write_moe
from nexus_ext.types import ModelShape


def shape_of(path: Path, pairs: dict[str, Value], names: tuple[str, ...] = ()) -> ModelShape:
    tensors = [Tensor(name, (8, 2)) for name in names]
    keys = {f"test.{key}": value for key, value in pairs.items()}
    write_gguf(path / "m.gguf", {"general.architecture": "test", **keys}, tensors)
    return open_gguf(path / "m.gguf").shape


def test_scalar_heads_hold_for_every_layer(tmp_path: Path) -> None:
    shape = shape_of(
        tmp_path,
        {
            "block_count": 3,
            "embedding_length": 64,
            "feed_forward_length": 96,
            "attention.head_count": 8,
            "attention.head_count_kv": 2,
            "context_length": 1000,
            "vocab_size": 77,
        },
    )
    assert shape == ModelShape("test", 3, 64, 96, 8, (2, 2, 2), 8, 8, 77, 1000, 0, 0)


def test_heads_and_widths_may_differ_by_layer(tmp_path: Path) -> None:
    shape = shape_of(
        tmp_path,
        {
            "block_count": 3,
            "embedding_length": 64,
            "feed_forward_length": [96, 128, 0],
            "attention.head_count": [8, 8, 4],
            "attention.head_count_kv": [2, 0, 4],
            "attention.key_length": 16,
            "attention.key_length_swa": 32,
            "attention.value_length": 24,
        },
    )
    assert (shape.n_ff, shape.n_heads, shape.n_heads_kv) == (128, 8, (2, 0, 4))
    assert (shape.head_dim_k, shape.head_dim_v) == (32, 24)


def test_without_own_heads_for_keys_there_are_as_many_as_for_queries(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, {"block_count": 2, "attention.head_count": 4})
    assert shape.n_heads_kv == (4, 4)


def test_recurrent_layers_keep_no_keys_and_values(tmp_path: Path) -> None:
    shape = shape_of(
        tmp_path,
        {"block_count": 4, "attention.head_count": 4, "attention.head_count_kv": 2},
        (
            "blk.0.ssm_conv1d.weight",
            "blk.0.attn_qkv.weight",  # some recurrent layers have one
            "blk.1.attn_k.weight",
            "blk.2.attn_k.weight",  # both side by side
            "blk.2.ssm_a",
            "blk.3.time_mix_key.weight",
        ),
    )
    assert shape.n_heads_kv == (0, 2, 2, 0)


def test_latent_attention_has_one_head_of_latent_width(tmp_path: Path) -> None:
    (path,) = write_moe(tmp_path / "m.gguf", arch="deepseek2")
    shape = open_gguf(path).shape
    assert (shape.n_heads_kv, shape.head_dim_k, shape.head_dim_v) == ((1, 1, 1), 96, 64)


def test_the_vocabulary_is_counted_from_tokens_then_key_then_embedding(tmp_path: Path) -> None:
    assert shape_of(tmp_path, {}, ("token_embd.weight",)).n_vocab == 2
    assert shape_of(tmp_path, {"vocab_size": 5}, ("token_embd.weight",)).n_vocab == 5
    pairs: dict[str, Value] = {
        "general.architecture": "test",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "test.vocab_size": 5,
    }
    (path,) = write_gguf(tmp_path / "m.gguf", pairs, [])
    assert open_gguf(path).shape.n_vocab == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", "three", r"'test\.block_count' holds 'three'"),
        ("block_count", Typed(5, -1), r"'test\.block_count' holds -1"),
        ("block_count", 2**32 - 1, r"'test\.block_count' holds 4294967295"),
        ("block_count", 4097, r"'test\.block_count' is 4097, the limit is 4096"),
        ("block_count", True, r"'test\.block_count' holds True"),
        ("embedding_length", 1.5, r"'test\.embedding_length' holds 1\.5"),
        ("attention.head_count_kv", [1, -2], r"holds -2"),
        ("attention.head_count_kv", [1] * 5000, r"holds ArraySize"),
    ],
)
def test_senseless_hyperparameters_are_refused(
    key: str, value: Value, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        shape_of(tmp_path, {key: value})


def test_per_layer_values_must_cover_the_layers(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"given for 2 layers, the model has 3"):
        shape_of(tmp_path, {"block_count": 3, "attention.head_count_kv": [1, 1]})
