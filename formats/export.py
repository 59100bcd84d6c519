"""Write tensors of a GGUF or an NXF to a safetensors file, for a look at them with other tools.

Weights become float32, by the gguf package's own arithmetic, a few rows at a time. Names are those
of GGUF and shapes those of PyTorch (outermost first); rows of queries and keys keep llama.cpp's
order. Knows nothing of architectures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nexus_ext.codecs import Codecs
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats.floats import FLOATS, convert_floats
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.safetensors import DTYPE_NBYTES, encode_safetensors_header
from nexus_ext.formats.sources import Source, open_source
from nexus_ext.types import TensorInfo

_PIECE_ELEMENTS = 1 << 20
_INTEGERS = ("I8", "I16", "I32", "I64")  # ggml calls them as safetensors does

# Called with (bytes written, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExportedTensor:
    """One tensor that was written."""

    name: str
    shape: tuple[int, ...]  # outermost first
    stored: str  # ggml type
    written: str  # dtype of safetensors
    nbytes: int


def export_tensors(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    pattern: str = "",
    *,
    overwrite: bool = False,
    codecs: Codecs | None = None,
    progress: Progress | None = None,
) -> tuple[ExportedTensor, ...]:
    """Write the tensors of the model `source` in whose names `pattern` is found; all for "".

    UsageError when the expression is wrong or finds nothing, or something is at `target`;
    FormatError for a type that the gguf package cannot decode; WriteFailed without space.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the regular expression {pattern!r} is wrong: {error}") from error
    opened = open_source(source, codecs)
    try:
        chosen = [
            (item, tensor)
            for item, tensor in enumerate(opened.catalog.tensors)
            if expression.search(tensor.name)
        ]
        if not chosen:
            raise UsageError(
                f"{opened.path}: no name of its {len(opened.catalog.tensors)} tensors contains "
                f"{pattern!r}",
                hint="`nexus inspect MODEL --tensors` lists them.",
            )
        tensors = tuple(_described(opened.path, tensor) for _, tensor in chosen)
        header = encode_safetensors_header(
            [(t.name, t.written, t.shape) for t in tensors],
            {"source": os.path.basename(opened.path), "names": "gguf"},
        )
        total = len(header) + sum(tensor.nbytes for tensor in tensors)
        with NewFile(target, expected_nbytes=total, overwrite=overwrite) as file:
            file.write(header)
            for (item, tensor), out in zip(chosen, tensors, strict=True):
                for piece in _decoded(opened, item, tensor, out.written):
                    file.write(piece)
                    if progress is not None:
                        progress(file.nbytes, total)
            file.commit()
        return tensors
    finally:
        opened.close()


def _described(path: str, tensor: TensorInfo) -> ExportedTensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = tensor.type_name
    if kind not in FLOATS and kind not in _INTEGERS:
        try:
            number = GGMLQuantizationType[kind]
            # One block of zeros: whether the package knows how, before anything is written.
            dequantize(np.zeros((1, _block(kind)[1]), np.uint8), number)
        except (KeyError, NotImplementedError):
            raise FormatError(
                f"{path}: the tensor {tensor.name!r} is of the type {kind}, which the gguf "
                "package cannot decode",
                hint="update gguf, or export a file whose types it decodes",
            ) from None
    written = kind if kind in _INTEGERS else "F32"
    elements = tensor.n_rows * tensor.shape[0]
    nbytes = elements * DTYPE_NBYTES[written]
    return ExportedTensor(tensor.name, tensor.shape[::-1], kind, written, nbytes)


def _decoded(source: Source, item: int, tensor: TensorInfo, written: str) -> Iterator[memoryview]:
    """Yield a tensor as `written`, in pieces of whole blocks."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = tensor.type_name
    elements, nbytes = _block(kind)
    # Rows are whole blocks, so a tensor is a run of blocks, whatever its shape.
    step = max(_PIECE_ELEMENTS // elements, 1) * nbytes
    buffer = bytearray(step)
    for start in range(0, tensor.nbytes, step):
        count = min(step, tensor.nbytes - start)
        data = source.read(item, start, count, buffer)
        if kind in _INTEGERS:
            yield data
        elif kind in FLOATS:
            values = convert_floats(np.frombuffer(data, FLOATS[kind]), kind, "F32", tensor.name)
            yield values.view(np.uint8).data
        else:
            blocks = np.frombuffer(data, np.uint8).reshape(1, count)
            values = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32, copy=False)
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _block(kind: str) -> tuple[int, int]:
    from nexus_ext.formats.ggml_types import ggml_types

    found = next(known for known in ggml_types().values() if known.name == kind)
    return found.block_elements, found.block_nbytes
