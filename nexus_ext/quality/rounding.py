"""Rounding that makes up for its own errors: codes of a block format, chosen column by column.

A matrix W (n_out, n_in) multiplies inputs x whose products are summed in H = X^T X. What rounding
to Q does to the outputs is E H E^T, E = W - Q, summed over its diagonal. Nearest rounding makes
every element of E small. Here a column is rounded to what is best together with the errors of the
columns before it: with H = R R^T, R upper triangular, a row e of E costs |e R|^2, and term j of
that is R_jj e_j + (sum over i < j of e_i R_ij); so the target of column j is
W_j + (sum over i < j of E_i R_ij) / R_jj. That is GPTQ (Frantar et al., 2022, arXiv:2210.17323),
written as the nearest-plane algorithm that it is equal to (arXiv:2507.18553).

Scales belong to blocks of columns. They are set as without compensation, but from the targets of
the block, when its first column is about to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

DAMPING = 0.01  # of the mean of H's diagonal, added to all of it


@dataclass(frozen=True, slots=True)
class Feedback:
    """How the error of one column moves the targets of later ones."""

    weights: Floats  # (n_in, n_in): R_ij / R_jj above the diagonal, else 0
    remaining: Floats  # (n_in,): R_jj^2, what an error in column j costs when all later ones adapt


def feedback(gram: Floats, damping: float = DAMPING) -> Feedback:
    """Return the feedback for inputs with these sums of products, shape (n_in, n_in)."""
    h = gram.astype(np.float64)
    diagonal = h.diagonal()
    h[np.diag_indices_from(h)] += damping * (float(diagonal.mean()) or 1.0)
    r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    scale = r.diagonal()
    return Feedback(np.triu(r / scale, 1).astype(np.float32), np.square(scale).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Grid:
    """What the scales of a block allow: base + step * levels[code], arrays (n_block, n_out)."""

    base: Floats
    step: Floats
    codes: Codes  # that the block has without compensation


def rounded(
    w: Floats,
    order: Feedback,
    n_block: int,
    levels: Floats,
    grid: Callable[[int, Floats], Grid],
    put: Callable[[int, Codes], None],
) -> None:
    """Round W, given transposed as (n_in, n_out), block by block.

    `grid` is called with the first column of a block and the targets of its columns, and sets the
    scales; `put` with the codes (n_block, n_out) that were chosen. `levels` are ascending.
    """
    n_in = len(w)
    errors = np.zeros_like(w)
    middles = (levels[1:] + levels[:-1]) / 2
    even = bool(np.all(np.diff(levels) == levels[1] - levels[0]))
    for begin in range(0, n_in, n_block):
        end = begin + n_block
        targets = w[begin:end] + order.weights[:begin, begin:end].T @ errors[:begin]
        here = grid(begin, targets)
        codes = here.codes.copy()
        inside = order.weights[begin:end, begin:end]
        for j in range(n_block):
            step = here.step[j]
            usable = step != 0
            at = np.divide(targets[j] - here.base[j], step, out=np.zeros_like(step), where=usable)
            if even:
                code = np.clip(np.rint(at - levels[0]), 0, len(levels) - 1).astype(np.uint8)
            else:
                code = np.searchsorted(middles, at).astype(np.uint8)
            codes[j] = np.where(usable, code, codes[j])
            value = here.base[j] + step * levels[codes[j]]
            errors[begin + j] = w[begin + j] - value
            targets[j + 1 :] += inside[j, j + 1 :, None] * errors[begin + j]
        put(begin, codes)
