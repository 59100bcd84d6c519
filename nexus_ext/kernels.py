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


def use_isa(name: str) -> None:
    """Use another implementation, in the whole process. UsageError when this machine cannot."""
    if name not in ISAS or not lib.nx_kernels_isa_usable(ISAS[name]):
        raise UsageError(
            f"kernels {name!r} cannot run on this machine",
            hint=f"use one of {', '.join(usable_isas())}",
        )
    check(lib.nx_kernels_use_isa(ISAS[name]), f"kernels {name}")


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
