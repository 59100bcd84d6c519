"""Read weights a few rows at a time: as stored, in another order, unpacked, or made ternary.

Every class here has the same four members. A matrix of any size passes through in pieces; the
only passes over a whole tensor are those that need its mean. Knows nothing of names.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nexus_ext.errors import FormatError
from nexus_ext.formats.floats import FLOATS, Array, from_float32, to_float32
from nexus_ext.formats.safetensors import StoredTensor, TensorReader

PIECE_NBYTES = 8 << 20
_CODES_PER_BYTE = 4


class Rows(Protocol):
    """A matrix (a vector is one row) that can be read in parts."""

    @property
    def dtype(self) -> str:
        """Type of what `read` returns: a key of `FLOATS`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @property
    def step(self) -> int:
        """Reads start and end at multiples of so many rows."""

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as an array (stop - start, columns)."""


class Stored:
    """Rows of a tensor as they lie in its file; leading dimensions are flattened to rows."""

    def __init__(
        self, reader: TensorReader, tensor: StoredTensor, first: int = 0, n_rows: int | None = None
    ) -> None:
        if tensor.dtype not in FLOATS:
            raise FormatError(
                f"{tensor.path}: the tensor {tensor.name!r} has the dtype {tensor.dtype}, which "
                "is not converted",
                hint="Download the model in BF16, F16 or F32.",
            )
        self._reader, self._tensor, self._first = reader, tensor, first
        self.dtype = tensor.dtype
        columns = tensor.shape[-1] if tensor.shape else 1
        total = tensor.nbytes // FLOATS[tensor.dtype].itemsize // max(columns, 1)
        self.shape = (total - first if n_rows is None else n_rows, columns)
        self.step = 1

    def read(self, start: int, stop: int) -> Array:
        columns, kind = self.shape[1], FLOATS[self.dtype]
        row_nbytes = columns * kind.itemsize
        data = self._reader.read(
            self._tensor, (self._first + start) * row_nbytes, (stop - start) * row_nbytes
        )
        return np.frombuffer(data, kind).reshape(stop - start, columns)


class Permuted:
    """Rows of queries or keys in the order of llama.cpp's "normal" rotary embedding.

    PyTorch rotates row i of a head with row i + head_dim / 2, llama.cpp row 2i with row 2i + 1.
    """

    def __init__(self, rows: Rows, head_dim: int) -> None:
        self._rows, self._head_dim = rows, head_dim
        self.dtype, self.shape = rows.dtype, rows.shape
        self.step = head_dim

    def read(self, start: int, stop: int) -> Array:
        halves = self._rows.read(start, stop).reshape(-1, 2, self._head_dim // 2, self.shape[1])
        pairs: Array = halves.swapaxes(1, 2).reshape(stop - start, self.shape[1])
        return pairs


class PermutedVector:
    """A bias of queries or keys in that order."""

    def __init__(self, rows: Rows, head_dim: int) -> None:
        self._rows, self._head_dim = rows, head_dim
        self.dtype, self.shape, self.step = rows.dtype, rows.shape, 1

    def read(self, start: int, stop: int) -> Array:
        halves = self._rows.read(start, stop).reshape(-1, 2, self._head_dim // 2)
        pairs: Array = halves.swapaxes(1, 2).reshape(stop - start, self.shape[1])
        return pairs


class Unpacked:
    """Ternary weights of 2 bits each, as transformers packs them, times their scale.

    A byte at (r, c) of the (n / 4, columns) tensor holds the rows r, r + n/4, r + 2n/4 and
    r + 3n/4 of column c, lowest bits first; 0, 1, 2 stand for -1, 0, 1.
    """

    dtype = "F32"
    step = 1

    def __init__(self, reader: TensorReader, tensor: StoredTensor, scale: float) -> None:
        self._reader, self._tensor, self._scale = reader, tensor, np.float32(scale)
        self.shape = (tensor.shape[0] * _CODES_PER_BYTE, tensor.shape[1])

    def read(self, start: int, stop: int) -> Array:
        quarter, columns = self._tensor.shape
        out = np.empty((stop - start, columns), np.float32)
        row = start
        while row < stop:
            group = row // quarter
            end = min(stop, (group + 1) * quarter)
            at = row - group * quarter
            data = self._reader.read(self._tensor, at * columns, (end - row) * columns)
            codes = (np.frombuffer(data, np.uint8) >> np.uint8(2 * group)) & np.uint8(3)
            if codes.size and int(codes.max()) > 2:
                raise FormatError(
                    f"{self._tensor.path}: the tensor {self._tensor.name!r} holds the code 3, "
                    "which is none of a ternary weight"
                )
            values = (codes.astype(np.float32) - np.float32(1)) * self._scale
            out[row - start : end - start] = values.reshape(end - row, columns)
            row = end
        return out


class MadeTernary:
    """Float weights rounded to -s, 0 or s, where s is the mean of their absolute values.

    BitNet b1.58 (Ma et al. 2024), equations 1 to 3; rounded to the stored type as transformers
    does. The mean takes a pass over the tensor of its own, at the first read.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._mean: np.float32 | None = None
        self.dtype, self.shape, self.step = rows.dtype, rows.shape, rows.step

    def read(self, start: int, stop: int) -> Array:
        if self._mean is None:
            self._mean = self._absolute_mean()
        inverse = np.float32(1) / self._mean
        values = to_float32(self._rows.read(start, stop), self.dtype)
        signs = np.clip(np.rint(values * inverse), -1, 1)
        return from_float32((signs / inverse).astype(np.float32), self.dtype)

    def _absolute_mean(self) -> np.float32:
        total = 0.0
        n_rows, columns = self.shape
        for start, stop in pieces(self._rows, PIECE_NBYTES):
            values = to_float32(self._rows.read(start, stop), self.dtype)
            total += float(np.abs(values).sum(dtype=np.float64))
        mean: np.float32 = np.float32(max(total / max(n_rows * columns, 1), 1e-5))
        return mean


class Constant:
    """A vector that is computed, not stored."""

    dtype = "F32"
    step = 1

    def __init__(self, values: tuple[float, ...]) -> None:
        self._values = np.array(values, np.float32)
        self.shape = (1, len(values))

    def read(self, start: int, stop: int) -> Array:
        return self._values.reshape(1, -1)[start:stop]


def pieces(rows: Rows, nbytes: int) -> list[tuple[int, int]]:
    """Return ranges of rows that take about `nbytes` each, and at least one step."""
    n_rows, columns = rows.shape
    row_nbytes = max(columns * FLOATS[rows.dtype].itemsize, 1)
    count = max(nbytes // row_nbytes // rows.step, 1) * rows.step
    return [(start, min(start + count, n_rows)) for start in range(0, n_rows, count)]
