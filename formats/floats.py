"""Conversions between the float types that models are stored in, on numpy arrays.

numpy has no bfloat16: arrays of BF16 are arrays of uint16 here, the upper halves of float32. All
conversions round to nearest, ties to even, as ggml and PyTorch do.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import FormatError

Array = npt.NDArray[Any]

# Name -> how numpy holds an element; the names are those of safetensors and of ggml.
FLOATS: Final[dict[str, Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}


def to_float32(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Return the values of an array of `dtype` in float32; exact but for F64."""
    values: npt.NDArray[np.float32]
    if dtype == "BF16":
        values = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values
    with np.errstate(over="ignore"):
        values = array.astype(np.float32, copy=False)
    return values


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Return float32 values as an array of `dtype`."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        # A NaN must not round to infinity: its quiet bit is set instead.
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        rounded = np.where(nan, bits | np.uint32(0x00400000), rounded)
        halves: Array = (rounded >> np.uint32(16)).astype(np.uint16)
        return halves
    with np.errstate(over="ignore"):
        result: Array = values.astype(FLOATS[dtype], copy=False)
    return result


def convert_floats(array: Array, source: str, target: str, name: str) -> Array:
    """Return `array` of the type `source` as one of the type `target`.

    FormatError when a finite value of the tensor `name` would become infinite: F16 ends at 65504.
    """
    if source == target:
        return array
    values = to_float32(array, source)
    result = from_float32(values, target)
    if target == "F16" or source == "F64":
        finite = np.isfinite(array if source == "F64" else values)
        if not np.array_equal(finite, np.isfinite(to_float32(result, target))):
            largest = float(np.abs(array if source == "F64" else values)[finite].max())
            raise FormatError(
                f"the tensor {name!r} holds the value {largest:g}, which {target} cannot hold",
                hint="Convert with --type bf16 or --type f32.",
            )
    return result
