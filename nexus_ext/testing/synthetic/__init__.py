"""Synthetic GGUF models: right shapes, random weights, written at the speed of the disk.

They load in llama.cpp and compute finite logits; what they say means nothing. The encoding is
written out here a second time, apart from `nexus_ext.formats`, so that one can test the other.
"""

from __future__ import annotations

from nexus_ext.testing.synthetic.container import Tensor, Typed, Value, write_gguf
from nexus_ext.testing.synthetic.models import (
    LLAMA_PRESETS,
    LlamaDims,
    MoeDims,
    llama_dims_for_size,
    write_llama,
    write_moe,
    write_preset,
)

__all__ = [
    "LLAMA_PRESETS",
    "LlamaDims",
    "MoeDims",
    "Tensor",
    "Typed",
    "Value",
    "llama_dims_for_size",
    "write_gguf",
    "write_llama",
    "write_moe",
    "write_preset",
]
