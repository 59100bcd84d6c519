"""How much each input channel of each weight matters: the mean squares of what goes into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Importance:
    """Of one weight: sums of squares (n_matrices, n_channels) over `counts` (n_matrices,) vectors.

    A dense weight is one matrix; of stacked experts each is one.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.uint64]

    @property
    def mean_squares(self) -> npt.NDArray[np.float32]:
        """E[x_i^2], shape (n_matrices, n_channels).

        A matrix that nothing went into has ones: every channel counts the same, as llama.cpp's
        quantize tool has it.
        """
        counts = self.counts.astype(np.float64)[:, None]
        means = np.divide(self.sums, counts, out=np.ones_like(self.sums), where=counts > 0)
        return means.astype(np.float32)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Of a whole model."""

    entries: Mapping[str, Importance]
    n_tokens: int  # of the calibration text

    @property
    def unused(self) -> int:
        """Number of experts that the text never reached."""
        return sum(int(np.count_nonzero(e.counts == 0)) for e in self.entries.values())
