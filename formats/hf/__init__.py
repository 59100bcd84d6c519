"""Models of the Hugging Face hub: a folder of safetensors, a configuration and a tokenizer."""

from __future__ import annotations

from nexus_ext.formats.hf.convert import (
    AUTO,
    FLOAT_TYPES,
    ConvertedTensor,
    ConvertReport,
    HfConversion,
    is_hf_folder,
)

__all__ = [
    "AUTO",
    "FLOAT_TYPES",
    "ConvertReport",
    "ConvertedTensor",
    "HfConversion",
    "is_hf_folder",
]
