"""Encode the header of a GGUF file: the counterpart of `gguf_header`.

Knows the encoding (version 3, little endian), not what keys and tensors mean. The data of tensors
is written by whoever has it, each tensor at the next multiple of the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nexus_ext.formats.ggml_types import GgmlType
from nexus_ext.formats.gguf_header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_NBYTES,
    ValueType,
    padded,
)

_VERSION = 3
_CODES = {ValueType.UINT32: "I", ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.BOOL: "?"}

# A value of metadata. int is written as UINT32, float as FLOAT32, an array of int as INT32: the
# types that llama.cpp asks for.
Scalar = bool | int | float | str | bytes
Value = Scalar | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bytes]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]  # ggml order, innermost first
    type: GgmlType

    @property
    def nbytes(self) -> int:
        """Bytes of its data; ValueError when a row is not a whole number of blocks."""
        elements = 1
        for extent in self.shape:
            elements *= extent
        if self.shape and self.shape[0] % self.type.block_elements:
            raise ValueError(
                f"{self.name}: rows of {self.shape[0]} do not fill blocks of {self.type.name}"
            )
        return elements // self.type.block_elements * self.type.block_nbytes


def encode_header(
    pairs: Mapping[str, Value],
    tensors: Sequence[TensorSpec],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """Return everything before the data, padded to the alignment.

    ValueError for what readers refuse: names that are too long or used twice, too many dimensions.
    """
    pieces = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(pairs))]
    for key, value in pairs.items():
        pieces += [_string(key), encode_value(value)]
    names: set[str] = set()
    offset = 0
    for tensor in tensors:
        name, dims = tensor.name.encode(), tensor.shape
        if not 1 <= len(name) <= MAX_NAME_NBYTES or tensor.name in names:
            raise ValueError(f"the tensor name {tensor.name!r} is empty, too long, or used twice")
        if not 1 <= len(dims) <= MAX_DIMS:
            raise ValueError(f"{tensor.name}: has {len(dims)} dimensions, not 1 to {MAX_DIMS}")
        names.add(tensor.name)
        pieces.append(struct.pack("<Q", len(name)) + name)
        pieces.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        pieces.append(struct.pack("<IQ", tensor.type.number, offset))
        offset = padded(offset + tensor.nbytes, alignment)
    encoded = b"".join(pieces)
    return encoded + bytes(padded(len(encoded), alignment) - len(encoded))


def encode_value(value: Value) -> bytes:
    """Return the type and the value of a pair. TypeError for what has no place in one."""
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, (bool, int, float)):
        kind = _kind(value)
        return struct.pack("<I" + _CODES[kind], kind, value)
    kinds = {_element_kind(item) for item in value}
    if len(kinds) > 1:
        raise TypeError(f"an array mixes {sorted(kind.name for kind in kinds)}")
    kind = kinds.pop() if kinds else ValueType.INT32
    head = struct.pack("<IIQ", ValueType.ARRAY, kind, len(value))
    if kind is ValueType.STRING:
        return head + b"".join(_string(item) for item in value)  # type: ignore[arg-type]
    return head + struct.pack(f"<{len(value)}{_CODES[kind]}", *value)


def _kind(value: object) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int):
        return ValueType.UINT32
    if isinstance(value, float):
        return ValueType.FLOAT32
    raise TypeError(f"{type(value).__name__} has no place in GGUF metadata")


def _element_kind(value: object) -> ValueType:
    if isinstance(value, (str, bytes)):
        return ValueType.STRING
    kind = _kind(value)
    return ValueType.INT32 if kind is ValueType.UINT32 else kind


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data
