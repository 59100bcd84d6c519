"""Which channels of what goes into a weight go together: sums of products over a text.

Of a weight of n input channels this is the matrix X^T X, n by n, of the vectors x that it is
multiplied by; of stacked experts one for each. The vectors are kept in C while a window of the text
is computed, and multiplied by numpy's BLAS after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nexus_ext import core
from nexus_ext.errors import NexusError
from nexus_ext.runtime.imatrix import observed
from nexus_ext.runtime.predictions import evaluate, opened, text_windows

if TYPE_CHECKING:
    from nexus_ext.placement import PlanRequest
    from nexus_ext.runtime.planning import Planned

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What goes into some matrices of one weight: a dense weight is one, and so is an expert."""

    name: str  # of the weight
    n_channels: int
    first: int  # matrix
    last: int  # behind it

    @property
    def nbytes(self) -> int:
        """Of the sums of products."""
        return 4 * self.n_channels**2 * (self.last - self.first)


class Activations:
    """Vectors in C that go into the weights of these names."""

    callback = "nx_activations_observe"

    def __init__(self, names: Sequence[str]) -> None:
        ffi, out = core.ffi, core.ffi.new("nx_activations **")
        kept = [ffi.new("char[]", name.encode()) for name in names]
        status = core.lib.nx_activations_create(ffi.new("char *[]", kept), len(names), out)
        core.check(status, "activations")
        self._activations = out[0]

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        core.lib.nx_activations_free(self._activations)
        self._activations = None

    @property
    def address(self) -> int:
        return int(core.ffi.cast("uintptr_t", self._activations))

    def rows(self, i: int) -> tuple[Floats, npt.NDArray[np.uint32]]:
        """Return the vectors (n, n_channels) that went into weight i, and into which matrix each.

        Valid until the next vector comes. Raises OutOfMemory when one did not fit.
        """
        core.check(core.lib.nx_activations_status(self._activations), "activations")
        ffi = core.ffi
        n_channels, n_rows = ffi.new("uint32_t *"), ffi.new("size_t *")
        rows, matrices = ffi.new("float const **"), ffi.new("uint32_t const **")
        status = core.lib.nx_activations_at(
            self._activations, i, n_channels, n_rows, rows, matrices
        )
        core.check(status, "activations")
        n = n_rows[0]
        if n == 0:
            return np.zeros((0, n_channels[0]), np.float32), np.zeros(0, np.uint32)
        x = np.frombuffer(ffi.buffer(rows[0], 4 * n * n_channels[0]), np.float32)
        which = np.frombuffer(ffi.buffer(matrices[0], 4 * n), np.uint32)
        return x.reshape(n, n_channels[0]), which

    def clear(self) -> None:
        core.lib.nx_activations_clear(self._activations)


def collect_products(
    model: str,
    wanted: Sequence[Inputs],
    text: bytes,
    planned: Planned,
    request: PlanRequest,
    *,
    n_ctx: int,
    most: int | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Floats]:
    """Evaluate a text and return X^T X of all that is wanted, (n_matrices, n_channels, n_channels).

    Takes the bytes of the result, and the vectors of one window of `n_ctx` tokens. Computes on the
    CPU. Raises UsageError when the text is too short, NexusError when values are not finite, and
    what a run may raise.
    """
    found = [np.zeros((w.last - w.first, w.n_channels, w.n_channels), np.float32) for w in wanted]
    names = list(dict.fromkeys(w.name for w in wanted))
    with Activations(names) as activations:
        with observed(activations), opened(model, planned, request) as llm:
            parts = text_windows(llm, text, n_ctx, most)
            for number, window in enumerate(parts):
                tick(number, len(parts))
                for _ in evaluate(llm, window.tokens, 0):
                    pass  # what is predicted does not matter, only what it is computed from
                for inputs, sums in zip(wanted, found, strict=True):
                    x, which = activations.rows(names.index(inputs.name))
                    for matrix in range(inputs.first, inputs.last):
                        part = x[which == matrix]
                        sums[matrix - inputs.first] += part.T @ part
                activations.clear()
    # A column of X with a value that is not finite makes its square on the diagonal so.
    if not all(np.isfinite(np.einsum("mii->mi", sums)).all() for sums in found):
        raise NexusError(
            "the model computes values that are not finite for this text",
            hint="`nexus verify` tells whether the file is damaged; try another text",
        )
    return found
