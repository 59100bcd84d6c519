"""Convert a model folder of the hub to one GGUF file, in pieces of a few megabytes.

Reads configuration, tokenizer and the headers of all weights first, so that whatever cannot be
converted is said before anything is written. Writes float types; quantizing is up to llama.cpp.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from nexus_ext.errors import UsageError
from nexus_ext.formats.floats import FLOATS, convert_floats
from nexus_ext.formats.ggml_types import GgmlType, ggml_types
from nexus_ext.formats.gguf_encode import TensorSpec, Value, encode_header
from nexus_ext.formats.gguf_header import DEFAULT_ALIGNMENT
from nexus_ext.formats.hf.config import HfModel, read_config
from nexus_ext.formats.hf.folder import HfFolder
from nexus_ext.formats.hf.rows import PIECE_NBYTES, pieces
from nexus_ext.formats.hf.tensors import OutTensor, plan_tensors
from nexus_ext.formats.hf.tokenizer import Tokenizer, read_tokenizer
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.safetensors import TensorReader

FLOAT_TYPES = ("f32", "f16", "bf16")
AUTO = "auto"
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type, by llama.h
_CONFIG = "config.json"

# Called with (bytes written, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ConvertedTensor:
    """One line of the report."""

    name: str
    shape: tuple[int, ...]  # ggml order
    stored: str
    written: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion has done, or would do."""

    source: str
    architecture: str
    tokenizer: str
    type_name: str  # of the weights
    ternary: bool
    nbytes: int  # of the file
    tensors: tuple[ConvertedTensor, ...]
    notes: tuple[str, ...]


class HfConversion:
    """A folder that was read and understood; `write` makes the file.

    `float_type` is one of FLOAT_TYPES, or "auto" for the type in which each weight is stored.
    `pre` names llama.cpp's pre-tokenizer where the files do not tell.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        float_type: str = AUTO,
        pre: str | None = None,
        name: str | None = None,
    ) -> None:
        if float_type not in (AUTO, *FLOAT_TYPES):
            raise UsageError(f"the type is {float_type!r}, not {AUTO} or {', '.join(FLOAT_TYPES)}")
        folder = HfFolder(path)
        config = folder.read_json(_CONFIG)
        self.model = read_config(config)
        self._reader = TensorReader()
        self._tensors = plan_tensors(self.model, folder.weights(), self._reader, folder.path)
        self._reader.close()  # until it is written; planning may have read scales
        self.tokenizer = read_tokenizer(folder, self.model.n_vocab, config, pre)
        self._specs = [_spec(tensor, float_type) for tensor in self._tensors]
        kind = _main_type(self._tensors, self._specs)
        title = name or os.path.basename(os.path.abspath(folder.path)) or self.model.arch.name
        self._header = encode_header(
            _metadata(self.model, self.tokenizer, title, kind), self._specs
        )
        self.report = ConvertReport(
            source=folder.path,
            architecture=self.model.arch.name,
            tokenizer=self.tokenizer.kind,
            type_name=kind,
            ternary=self.model.ternary is not None,
            nbytes=len(self._header) + sum(_padded(spec.nbytes) for spec in self._specs),
            tensors=tuple(
                ConvertedTensor(
                    name=spec.name,
                    shape=spec.shape,
                    stored="/".join(sorted(tensor.stored_dtypes)),
                    written=spec.type.name,
                    nbytes=spec.nbytes,
                )
                for tensor, spec in zip(self._tensors, self._specs, strict=True)
            ),
            notes=self.model.notes + self.tokenizer.notes,
        )

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> ConvertReport:
        """Write the GGUF file; it appears under its name when it is complete.

        UsageError if something is there already, WriteFailed without space, FormatError for
        values that the chosen type cannot hold.
        """
        with (
            closing(self._reader),
            NewFile(path, expected_nbytes=self.report.nbytes, overwrite=overwrite) as file,
        ):
            file.write(self._header)
            for tensor, spec in zip(self._tensors, self._specs, strict=True):
                start = file.nbytes
                for piece in _encoded(tensor, spec.type.name):
                    file.write(piece)
                    if progress is not None:
                        progress(file.nbytes, self.report.nbytes)
                if file.nbytes - start != spec.nbytes:
                    raise AssertionError(f"{spec.name}: {file.nbytes - start} bytes were written")
                file.pad(DEFAULT_ALIGNMENT)
            file.commit()
        return self.report


def _spec(tensor: OutTensor, float_type: str) -> TensorSpec:
    """Choose the type of a tensor. "auto" loses nothing: each keeps the type it is stored in."""
    if not tensor.is_weight:
        kind = "F32"
    elif float_type == AUTO:
        stored = tensor.stored_dtypes
        kind = next(iter(stored)) if len(stored) == 1 and stored <= _FILE_TYPES.keys() else "F32"
    else:
        kind = float_type.upper()
    return TensorSpec(tensor.name, tensor.shape[::-1], _types_by_name()[kind])


def _main_type(tensors: list[OutTensor], specs: list[TensorSpec]) -> str:
    """Return the type of most weights."""
    counts: Counter[str] = Counter()
    for tensor, spec in zip(tensors, specs, strict=True):
        if tensor.is_weight:
            counts[spec.type.name] += math.prod(spec.shape)
    return counts.most_common(1)[0][0]


def _types_by_name() -> Mapping[str, GgmlType]:
    return {kind.name: kind for kind in ggml_types().values()}


def _encoded(tensor: OutTensor, kind: str) -> Iterator[memoryview]:
    """Yield the data of a tensor in pieces."""
    for part in tensor.parts:
        for start, stop in pieces(part, PIECE_NBYTES):
            values = convert_floats(part.read(start, stop), part.dtype, kind, tensor.name)
            yield np.ascontiguousarray(values, FLOATS[kind]).reshape(-1).view(np.uint8).data


def _metadata(model: HfModel, tokenizer: Tokenizer, name: str, kind: str) -> dict[str, Value]:
    pairs: dict[str, Value] = {
        "general.architecture": model.arch.name,
        "general.type": "model",
        "general.name": name.encode("utf-8", "replace"),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    return {**pairs, **model.pairs, **tokenizer.pairs}


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % DEFAULT_ALIGNMENT


def is_hf_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a config.json."""
    return os.path.isfile(os.path.join(path, _CONFIG))
