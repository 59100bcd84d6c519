"""A trained model that can be quantized: the one in the repository is quantized already."""

from __future__ import annotations

from pathlib import Path

import gguf

from nexus_ext.formats import open_gguf
from nexus_ext.formats.floats import from_float32
from nexus_ext.runtime.weights import Weights
from tests.models_folder import find_model


def write_trained_f16(target: Path) -> str:
    """Write a trained model, whose weights are known to be those of Q4_K, as an F16 original."""
    path = find_model("tinydense-7M-Q4_K_M.gguf")
    weights = Weights(open_gguf(path))
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(str(target), arch="llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    for raw in reader.tensors:
        tensor = weights.tensors[raw.name]
        rows = weights.rows(tensor, slice(None))
        if len(tensor.shape) == 1:
            writer.add_tensor(raw.name, rows[0])
        else:
            writer.add_tensor(raw.name, from_float32(rows, "F16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)
