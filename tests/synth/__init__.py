"""Synthetic GGUF models: right shapes, random weights, written at the speed of the disk.

Tests and benchmarks import from here; `python -m tests.synth` is the command line.
"""

from __future__ import annotations

from tests.synth.container import Tensor, Typed, Value, write_gguf
from tests.synth.models import (
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
