"""ggml's own quantization of rows of weights, for arrays: what a type would do to a tensor.

The same functions that llama.cpp's quantizer and its CPU backend use, so an error that is measured
here is the error that a model will have.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import BackendUnavailable, UsageError
from nexus_ext.formats.ggml_types import GgmlType
from nexus_ext.runtime import ggml

Floats = npt.NDArray[np.float32]


class _Traits(ctypes.Structure):
    """The beginning of ggml's `struct ggml_type_traits`; checked before it is believed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _traits(kind: GgmlType) -> Any:
    get = ggml.function("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int)
    traits = get(kind.number).contents
    seen = (traits.type_name.upper().decode(), traits.blck_size, traits.type_size)
    if seen != (kind.name, kind.block_elements, kind.block_nbytes) or not traits.to_float:
        raise BackendUnavailable(
            f"this ggml describes type {kind.name} as {seen}, which is not what was expected",
            hint="run `nexus doctor`",
        )
    return traits


def row_nbytes(kind: GgmlType, n: int) -> int:
    """Return the bytes of a row of `n` weights. UsageError when blocks do not divide it."""
    if n % kind.block_elements:
        raise UsageError(f"{kind.name} packs {kind.block_elements} weights, a row has {n}")
    return n // kind.block_elements * kind.block_nbytes


def encode(kind: GgmlType, rows: Floats, importance: Floats | None = None) -> bytes:
    """Quantize `rows` (n_rows, n); `importance` (n,) weighs the columns, as in an imatrix."""
    n_rows, n = rows.shape
    rows = np.ascontiguousarray(rows)
    out = ctypes.create_string_buffer(n_rows * row_nbytes(kind, n))
    quantize = ggml.function(
        "ggml_quantize_chunk",
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        weights = importance.ctypes.data
    done = quantize(kind.number, rows.ctypes.data, out, 0, n_rows, n, weights)
    assert done == len(out), "ggml fills exactly what it says a row takes"
    return out.raw


def decode(kind: GgmlType, data: bytes | memoryview, n: int) -> Floats:
    """Return the rows of `n` weights that `data` holds, float32 (n_rows, n)."""
    n_rows = len(data) // row_nbytes(kind, n)
    source = np.frombuffer(data, np.uint8)
    out = np.empty((n_rows, n), np.float32)
    if kind.name == "F32":
        return source.view(np.float32).reshape(n_rows, n)
    _traits(kind).to_float(source.ctypes.data, out.ctypes.data, out.size)
    return out
