"""Kernels of our own: which instruction set they use, and residual correction of matrices.

Thin: native/include/nexus_kernels.h and nexus_residual.h describe layouts and methods. Arrays
are numpy's, which is imported only when a function needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_ext.core import check, ffi, lib
from nexus_ext.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ISAS: dict[str, int] = {
    ffi.string(lib.nx_kernels_isa_name(isa)).decode(): isa for isa in range(lib.NX_ISA_COUNT)
}
"""The implementations that exist, by name: "reference" is portable C."""


def usable_isas() -> list[str]:
    """Return the implementations that this machine can run, the reference first."""
    return [name for name, isa in ISAS.items() if lib.nx_kernels_isa_usable(isa)]


def current_isa() -> str:
    """Return the implementation in use."""
    return str(ffi.string(lib.nx_kernels_isa_name(lib.nx_kernels_isa())).decode())


def why() -> str:
    """Return one sentence: the implementation in use, and the reason."""
    return str(ffi.string(lib.nx_kernels_why()).decode())


def dots_per_second() -> float:
    """Measure the rate of instructions that sum 64 products of bytes, of one core; 0: not known."""
    return float(lib.nx_kernels_dots_per_second())


def use_isa(name: str) -> None:
    """Use another implementation, in the whole process. UsageError when this machine cannot."""
    if name not in ISAS or not lib.nx_kernels_isa_usable(ISAS[name]):
        raise UsageError(
            f"kernels {name!r} cannot run on this machine",
            hint=f"use one of {', '.join(usable_isas())}",
        )
    check(lib.nx_kernels_use_isa(ISAS[name]), f"kernels {name}")


TERNARY: dict[str, int] = {
    name: int(lib.nx_ternary_type_of(name.encode())) for name in ("tq1_0", "tq2_0", "q2_0", "q1_0")
}
"""The block types that `PackedMatrix` knows, by llama.cpp's names for them."""


def packed_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Return the memory that a matrix of one of the types in `TERNARY` takes when it is packed."""
    return int(lib.nx_ternary_packed_bytes(TERNARY[type_name], n_in, n_out))


class PackedMatrix:
    """A matrix of few bits, packed from llama.cpp's blocks: see nexus_ternary.h."""

    def __init__(self, type_name: str, rows: NDArray[np.uint8], n_in: int) -> None:
        """Pack `rows`, uint8 (n_out, bytes of a row), contiguous. UsageError for other sizes."""
        kind = _kind_of(type_name, rows, n_in)
        self.n_in, self.n_out = n_in, len(rows)
        self.row_unit = int(lib.nx_ternary_row_unit(kind))
        self._kind = kind
        memory = ffi.new("nx_ternary *")
        check(lib.nx_ternary_create(kind, n_in, self.n_out, memory), "packing a matrix")
        self._matrix = ffi.gc(memory, lib.nx_ternary_free)
        lib.nx_ternary_pack(memory, _pointer("void *", rows), rows.strides[0], 0, self.n_out)
        lib.nx_ternary_finish(memory)

    @property
    def nbytes(self) -> int:
        return int(self._matrix.codes_bytes + self._matrix.scales_bytes)

    def unpack(self) -> NDArray[np.float32]:
        """Return the matrix as float32 (n_out, n_in)."""
        import numpy as np

        out = np.empty((self.n_out, self.n_in), np.float32)
        lib.nx_ternary_unpack(self._matrix, 0, self.n_out, _pointer("float *", out))
        return out

    def activate(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Round columns x, float32 (n_columns, n_in), to 8 bits as ggml does; in our layout."""
        return _activate(self._kind, x, self.n_in)

    def multiply_into(
        self, columns: NDArray[np.uint8], y: NDArray[np.float32], begin: int, end: int
    ) -> None:
        """Write rows [begin, end) of the products with `columns` to y, (n_columns, n_out).

        `begin` is a multiple of `row_unit`. Releases the interpreter lock.
        """
        lib.nx_ternary_multiply(
            self._matrix,
            _pointer("void *", columns),
            len(columns),
            begin,
            end,
            _pointer("float *", y),
            self.n_out,
        )

    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products with columns x, float32 (n_columns, n_in) -> (n_columns, n_out)."""
        import numpy as np

        y = np.empty((len(x), self.n_out), np.float32)
        self.multiply_into(self.activate(x), y, 0, self.n_out)
        return y


class StoredMatrix:
    """The same matrix as llama.cpp stores it: multiplied by without packing."""

    row_unit = 1

    def __init__(self, type_name: str, rows: NDArray[np.uint8], n_in: int) -> None:
        """Take `rows`, uint8 (n_out, bytes of a row); no copy is made. UsageError as above."""
        self._kind = _kind_of(type_name, rows, n_in)
        self._rows = rows
        self.n_in, self.n_out, self.nbytes = n_in, len(rows), int(rows.nbytes)

    def activate(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """As `PackedMatrix.activate`."""
        return _activate(self._kind, x, self.n_in)

    def multiply_into(
        self, columns: NDArray[np.uint8], y: NDArray[np.float32], begin: int, end: int
    ) -> None:
        """As `PackedMatrix.multiply_into`, for any `begin`."""
        n = len(columns)
        at = ffi.new("void *[]", [_pointer("void *", column) for column in columns])
        results = ffi.new("float *[]", [_pointer("float *", result) for result in y])
        lib.nx_ternary_multiply_stored(
            self._kind,
            _pointer("void *", self._rows),
            self._rows.strides[0],
            self.n_in,
            ffi.cast("void **", at),
            n,
            begin,
            end,
            results,
        )

    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products with columns x, float32 (n_columns, n_in) -> (n_columns, n_out)."""
        import numpy as np

        y = np.empty((len(x), self.n_out), np.float32)
        self.multiply_into(self.activate(x), y, 0, self.n_out)
        return y


def stored_is_fast(type_name: str) -> bool:
    """Return whether the implementation in use has a kernel for rows as they are stored."""
    return type_name in TERNARY and bool(lib.nx_ternary_stored_usable(TERNARY[type_name]))


def open_opencl() -> tuple[bool, str]:
    """Look for an OpenCL device, once a process. Return whether there is one, and a sentence."""
    usable = lib.nx_opencl_open() == lib.NX_OK
    return usable, str(ffi.string(lib.nx_opencl_why()).decode(errors="replace"))


class DeviceMatrix:
    """The same matrix on the OpenCL device. UsageError where there is none."""

    def __init__(self, type_name: str, rows: NDArray[np.uint8], n_in: int) -> None:
        """Copy `rows`, uint8 (n_out, bytes of a row), to the device."""
        self._kind = _kind_of(type_name, rows, n_in)
        self.n_in, self.n_out = n_in, len(rows)
        usable, why_not = open_opencl()
        if not usable:
            raise UsageError(why_not, hint="install a driver, or use the CPU's kernels")
        memory = ffi.new("nx_opencl_matrix **")
        status = lib.nx_opencl_matrix_create(
            self._kind, _pointer("void *", rows), rows.strides[0], n_in, self.n_out, memory
        )
        check(status, f"a matrix on the device ({_opencl_error()})")
        self._matrix = ffi.gc(memory[0], lib.nx_opencl_matrix_free)
        self.nbytes = int(lib.nx_opencl_matrix_bytes(self._matrix))

    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products with columns x, float32 (n_columns, n_in) -> (n_columns, n_out).

        Raises OutOfMemory, or ReadFailed with what the device said.
        """
        import numpy as np

        y = np.empty((len(x), self.n_out), np.float32)
        columns = _activate(self._kind, x, self.n_in)
        status = lib.nx_opencl_multiply(
            self._matrix, _pointer("void *", columns), len(x), _pointer("float *", y), self.n_out
        )
        check(status, _opencl_error())
        return y


def _opencl_error() -> str:
    return str(ffi.string(lib.nx_opencl_error()).decode())


def _kind_of(type_name: str, rows: NDArray[np.uint8], n_in: int) -> int:
    kind = TERNARY.get(type_name)
    block = lib.nx_ternary_block(kind) if kind is not None else 1
    nbytes = n_in // block * lib.nx_ternary_block_bytes(kind) if kind is not None else 0
    if kind is None or n_in % block or rows.ndim != 2 or rows.shape[1] != nbytes:
        raise UsageError(
            f"rows of shape {rows.shape} are no {type_name} matrix of {n_in} columns",
            hint=f"types are {', '.join(TERNARY)}; a row is a whole number of blocks",
        )
    return kind


def _activate(kind: int, x: NDArray[np.float32], n_in: int) -> NDArray[np.uint8]:
    import numpy as np

    values = np.ascontiguousarray(x, np.float32)
    nbytes = int(lib.nx_ternary_activation_bytes(kind, n_in))
    memory = np.empty(len(values) * nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    out = memory[start : start + len(values) * nbytes].reshape(len(values), nbytes)
    for column, rounded in zip(values, out, strict=True):
        lib.nx_ternary_activate(
            kind,
            _pointer("float *", column),
            0,
            n_in // lib.nx_ternary_block(kind),
            _pointer("void *", rounded),
        )
    return out


def _pointer(kind: str, array: Any) -> Any:
    return ffi.cast(kind, array.ctypes.data)


@dataclass(frozen=True, slots=True)
class Residual:
    """W - dequant(Wq) of one matrix at four bits, as `Model.attach_residual` takes it.

    codes: uint8 (n_in, row_bytes), one row for each input channel; scales: float32 (n_out,).
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)

    def decode(self) -> NDArray[np.float32]:
        """Return the matrix that the codes stand for, float32 (n_out, n_in)."""
        import numpy as np

        n_in, n_out = len(self.codes), len(self.scales)
        out = np.empty((n_out, n_in), np.float32)
        matrix = _matrix(self)
        lib.nx_residual_decode(matrix, 0, n_out, _pointer("float *", out), n_in)
        return out


def row_bytes(n_out: int) -> int:
    """Return the bytes that one input channel of a residual takes."""
    return int(lib.nx_residual_row_bytes(n_out))


def _matrix(residual: Residual) -> Any:
    matrix = ffi.new("nx_residual_matrix *")
    matrix.n_in, matrix.n_out = len(residual.codes), len(residual.scales)
    matrix.codes = _pointer("uint8_t *", residual.codes)
    matrix.scales = _pointer("float *", residual.scales)
    return matrix


def encode_residual(residual: NDArray[np.float32], n_threads: int = 1) -> Residual:
    """Quantize a residual, float32 (n_out, n_in), to four bits with one scale for each row.

    The scale is the best of 32 candidates by squared error (DecDEC, OSDI 2025, section 4.2).
    UsageError for another shape or type, or values that are not finite.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    if residual.ndim != 2 or residual.dtype != np.float32:
        raise UsageError(
            f"a residual is a float32 matrix, this is {residual.dtype} of shape {residual.shape}",
            hint="convert it with .astype(np.float32)",
        )
    rows = np.ascontiguousarray(residual)
    n_out, n_in = rows.shape
    line = int(lib.NX_RESIDUAL_LINE)
    out = Residual(
        codes=np.empty((n_in, row_bytes(n_out)), np.uint8), scales=np.empty(n_out, np.float32)
    )

    def some(begin: int) -> int:
        return int(
            lib.nx_residual_encode(
                _pointer("float *", rows),
                n_in,
                n_in,
                n_out,
                begin,
                min(begin + line, n_out),
                _pointer("uint8_t *", out.codes),
                _pointer("float *", out.scales),
            )
        )

    with ThreadPoolExecutor(n_threads) as pool:
        for status in pool.map(some, range(0, n_out, line)):
            if status != lib.NX_OK:
                raise UsageError(
                    "the residual has values that are not finite",
                    hint="look at the weights that it was made of",
                )
    return out


def select_channels(x: NDArray[np.float32], k: int) -> NDArray[np.uint32]:
    """Return the `k` channels with the largest |x| in ascending order (exact; ties: the first)."""
    import numpy as np

    values = np.ascontiguousarray(x, np.float32)
    out = np.empty(min(k, values.size), np.uint32)
    n = lib.nx_residual_select(
        _pointer("float *", values), values.size, k, _pointer("uint32_t *", out)
    )
    return out[:n]


def select_channels_by_bucket(
    x: NDArray[np.float32], k: int, high: float, low: float
) -> NDArray[np.uint32]:
    """Choose about the `k` largest |x| through 32 buckets (DecDEC, OSDI 2025, section 4.3).

    high: the largest |x| seen in calibration; low: the largest k-th |x| seen.
    """
    import numpy as np

    values = np.ascontiguousarray(x, np.float32)
    out = np.empty(min(k, values.size), np.uint32)
    n = lib.nx_residual_select_buckets(
        _pointer("float *", values), values.size, k, high, low, _pointer("uint32_t *", out)
    )
    return out[:n]


def add_residual(
    residual: Residual, x: NDArray[np.float32], channels: NDArray[np.uint32], y: NDArray[np.float32]
) -> None:
    """Add R[:, channels] x[channels] to y, float32 (n_out,), in place. x: float32 (n_in,)."""
    import numpy as np

    n, n_out = len(channels), len(residual.scales)
    chosen = np.ascontiguousarray(channels, np.uint32)
    values = np.ascontiguousarray(x, np.float32)
    if values.shape != (len(residual.codes),) or y.shape != (n_out,) or y.dtype != np.float32:
        raise UsageError(
            f"x has the shape {values.shape} and y {y.shape} of {y.dtype}, "
            f"the residual has {len(residual.codes)} input and {n_out} output channels",
            hint="give one float32 vector of each",
        )
    if n and int(chosen.max()) >= values.size:
        raise UsageError(
            f"channel {int(chosen.max())} does not exist, there are {values.size}",
            hint="choose channels with select_channels",
        )
    products = np.empty(16 * max(n, 1), np.float32)
    sums = np.empty(n_out + int(lib.NX_RESIDUAL_LINE), np.float32)
    at = _pointer("uint32_t *", chosen)
    lib.nx_residual_products(_pointer("float *", values), at, n, _pointer("float *", products))
    lib.nx_residual_add(
        _matrix(residual),
        at,
        _pointer("float *", products),
        n,
        0,
        n_out,
        _pointer("float *", sums),
        _pointer("float *", y),
    )
