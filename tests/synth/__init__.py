"""Models for tests and benchmarks; `python -m tests.synth` is the command line.

GGUFs are those of `nexus_ext.testing.synthetic`, which plugins are tested with as well. Folders of
Hugging Face (`hf`) and hand-made NXF files (`nxf`) are of use here alone.
"""

from __future__ import annotations

from nexus_ext.testing.synthetic import (
    LLAMA_PRESETS,
    LlamaDims,
    MoeDims,
    Tensor,
    Typed,
    Value,
    llama_dims_for_size,
    write_gguf,
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
