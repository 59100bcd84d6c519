"""From the key-value pairs of a GGUF header to a `ModelShape`, for any architecture.

Reads the keys that all architectures share (`<architecture>.block_count` and the like). Where a
value differs between layers and the shape holds one number, it takes the largest, so that what
is computed from it (a cache, a buffer) is never too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nexus_ext.errors import FormatError
from nexus_ext.formats.gguf_header import ArraySize
from nexus_ext.formats.roles import KEY_VALUE, RECURRENT, split_name
from nexus_ext.types import ModelShape, TensorInfo

# Far above llama.cpp's own limit (512); bounds the per-layer values.
MAX_LAYERS = 4096
_MAX_VALUE = 2**31 - 1


class _Keys:
    """Checked access to the integers under `<architecture>.`."""

    def __init__(self, path: str, metadata: Mapping[str, object]) -> None:
        self.path = path
        self.metadata = metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise FormatError(
                f"{path}: the key 'general.architecture' is {architecture!r}, not a name",
                hint="The file is not a model for llama.cpp.",
            )
        self.architecture = architecture

    def get(self, name: str, default: int) -> int:
        """Return one integer: of an array the largest."""
        values = self.per_layer(name)
        return max(values, default=default) if isinstance(values, tuple) else values

    def per_layer(self, name: str) -> int | tuple[int, ...]:
        """Return the integer or the array of them; an empty array if the key is absent."""
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, ())
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if type(number) is not int or not 0 <= number <= _MAX_VALUE:
                raise FormatError(
                    f"{self.path}: the key {key!r} holds {number!r}, not an integer between 0 "
                    f"and {_MAX_VALUE}"
                )
        return numbers if isinstance(value, tuple) else numbers[0]


def model_shape(
    path: str, metadata: Mapping[str, object], tensors: Iterable[TensorInfo]
) -> ModelShape:
    """Return the hyperparameters of the model at `path` (which only names it in errors)."""
    keys = _Keys(path, metadata)
    n_layers = keys.get("block_count", 0)
    if n_layers > MAX_LAYERS:
        raise FormatError(
            f"{path}: the key '{keys.architecture}.block_count' is {n_layers}, the limit is "
            f"{MAX_LAYERS}"
        )
    n_embd = keys.get("embedding_length", 0)
    n_heads = keys.get("attention.head_count", 0)
    head_dim = n_embd // n_heads if n_heads else 0
    return ModelShape(
        architecture=keys.architecture,
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=keys.get("feed_forward_length", 0),
        n_heads=n_heads,
        n_heads_kv=_heads_kv(keys, n_layers, tensors),
        # Layers with a sliding window may have heads of their own size.
        head_dim_k=max(
            keys.get("attention.key_length", head_dim), keys.get("attention.key_length_swa", 0)
        ),
        head_dim_v=max(
            keys.get("attention.value_length", head_dim), keys.get("attention.value_length_swa", 0)
        ),
        n_vocab=_n_vocab(keys, metadata, tensors),
        n_ctx_train=keys.get("context_length", 0),
        n_experts=keys.get("expert_count", 0),
        n_experts_used=keys.get("expert_used_count", 0),
    )


def _heads_kv(keys: _Keys, n_layers: int, tensors: Iterable[TensorInfo]) -> tuple[int, ...]:
    """Heads of the key-value cache by layer: 0 for layers that keep a recurrent state."""
    values = keys.per_layer("attention.head_count_kv")
    if values == ():
        values = keys.per_layer("attention.head_count") or 0
    if isinstance(values, int):
        values = (values,) * n_layers
    if len(values) < n_layers:
        raise FormatError(
            f"{keys.path}: the heads of '{keys.architecture}' are given for {len(values)} layers, "
            f"the model has {n_layers}"
        )
    parts: dict[int, set[str]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            parts.setdefault(tensor.layer, set()).add(split_name(tensor.name)[1])
    return tuple(
        0 if (have := parts.get(layer, set())) & RECURRENT and not have & KEY_VALUE else heads
        for layer, heads in enumerate(values[:n_layers])
    )


def _n_vocab(keys: _Keys, metadata: Mapping[str, object], tensors: Iterable[TensorInfo]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, ArraySize):
        return tokens.length
    declared = keys.get("vocab_size", 0)
    if declared:
        return declared
    return next((t.n_rows for t in tensors if t.name == "token_embd.weight"), 0)
