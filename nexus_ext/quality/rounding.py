"""Rounding that makes up for its own errors: codes of a block format, chosen column by column.

A matrix W (n_out, n_in) multiplies inputs x whose products are summed in H = X^T X. What rounding
to Q does to the outputs is E H E^T, E = W - Q, summed over its diagonal. Nearest rounding makes
every element of E small. Here a column is rounded to what is best together with the errors of the
columns before it: with H = R R^T, R upper triangular, a row e of E costs |e R|^2, and term j of
that is R_jj e_j + (sum over i < j of e_i R_ij); so the target of column j is
W_j + (sum over i < j of E_i R_ij) / R_jj. That is GPTQ (Frantar et al., 2022, arXiv:2210.17323),
written as the nearest-plane algorithm that it is equal to (arXiv:2507.18553). Columns with large
inputs come first, as far as blocks stay together.

Then columns are visited again, in sweeps: each takes the code that is best beside all others as
they are now (coordinate descent; Behdin et al., 2023, arXiv:2309.01885), which only lowers the
cost.

Scales belong to blocks of columns. They are set as without compensation, but from the targets of
the block, when its first column is about to be rounded. Where there are several proposals, a row
takes the one that makes its terms for the block smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

# What is added to the diagonal of H: a share of itself, since not all that channels had in common
# in a short text is to be relied on; and GPTQ's share of its mean, for channels hardly seen.
SHRINKAGE = 0.1
DAMPING = 0.01
SWEEPS = 2
_TOGETHER = 32  # columns whose errors move the columns behind them in one product


@dataclass(frozen=True, slots=True)
class Feedback:
    """How the error of one column moves the targets of others; columns in order of rounding."""

    order: npt.NDArray[np.int64]  # (n_in,) columns, whole blocks together
    products: Floats  # (n_in, n_in): H with damping
    weights: Floats  # (n_in, n_in): R_ij / R_jj above the diagonal, else 0
    remaining: Floats  # (n_in,): R_jj^2, what an error in column j costs when all later ones adapt


def feedback(gram: Floats, n_block: int) -> Feedback:
    """Return the feedback for inputs with these sums of products, shape (n_in, n_in).

    Inputs that were never seen count alike, and as little as damping is. Takes 30 n_in^2 bytes
    while it works and 8 n_in^2 after that.
    """
    diagonal = gram.diagonal().astype(np.float64)
    blocks = diagonal.reshape(-1, n_block)
    first = np.argsort(-blocks.sum(axis=1), kind="stable")
    inside = np.argsort(-blocks, axis=1, kind="stable")
    order = (first[:, None] * n_block + inside[first]).ravel()
    h = gram[np.ix_(order, order)].astype(np.float64)
    h[np.diag_indices_from(h)] += SHRINKAGE * diagonal[order] + DAMPING * (diagonal.mean() or 1.0)
    r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    scale = r.diagonal().copy()
    weights = np.triu(r / scale, 1).astype(np.float32)
    return Feedback(order, h.astype(np.float32), weights, np.square(scale).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Grid:
    """What the scales of a block allow: base + step * levels[code], arrays (n_block, n_out)."""

    base: Floats
    step: Floats
    codes: Codes  # where the step is 0, any code will do: these

    def columns(self, which: npt.NDArray[np.int64]) -> Grid:
        return Grid(
            np.take(self.base, which, axis=0),  # unlike [which], always contiguous
            np.take(self.step, which, axis=0),
            np.take(self.codes, which, axis=0),
        )

    def nearest(self, j: int, wanted: Floats, levels: Floats) -> tuple[Codes, Floats]:
        """Return the codes of column j that are nearest to `wanted` (n_out,), and their values."""
        base, step = self.base[j], self.step[j]
        usable = step != 0
        at = np.divide(wanted - base, step, out=np.zeros_like(step), where=usable)
        found = np.searchsorted((levels[1:] + levels[:-1]) / 2, at).astype(np.uint8)
        code = np.where(usable, found, self.codes[j])
        return code, base + step * levels[code]


def rounded(
    w: Floats,
    known: Feedback,
    n_block: int,
    levels: Floats,
    propose: Callable[[int, Floats], Sequence[Grid]],
    put: Callable[[int, npt.NDArray[np.intp], Codes], None],
    sweeps: int = SWEEPS,
) -> None:
    """Round W, given transposed as (n_in, n_out), block by block.

    `propose` is called with the first column of a block and the targets of its columns, and returns
    grids that its scales may span; `put` with the first column, the number of the proposal that
    each row took, and the codes (n_block, n_out). `levels` are ascending.
    """
    n_in = len(w)
    w = w[known.order]
    errors = np.zeros_like(w)
    grids: list[Grid] = []
    picks: list[npt.NDArray[np.intp]] = []
    for begin in range(0, n_in, n_block):
        here = slice(begin, begin + n_block)
        first = int(known.order[here].min())
        places = known.order[here] - first
        targets = w[here] + known.weights[:begin, here].T @ errors[:begin]
        inside, remaining = known.weights[here, here], known.remaining[here]
        natural = np.empty_like(targets)
        natural[places] = targets
        tried = []
        for grid in propose(first, natural):
            grid = grid.columns(places)
            tried.append((grid, *_round_block(w[here], targets, inside, remaining, levels, grid)))
        pick = np.argmin([cost for *_, cost in tried], axis=0)
        errors[here] = _picked([lost for _, _, lost, _ in tried], pick)
        grids.append(
            Grid(
                _picked([grid.base for grid, *_ in tried], pick),
                _picked([grid.step for grid, *_ in tried], pick),
                _picked([codes for _, codes, *_ in tried], pick),
            )
        )
        picks.append(pick)
    for _ in range(sweeps):
        for number, grid in enumerate(grids):
            _sweep(w, errors, known.products, number * n_block, levels, grid)
    for number, (grid, pick) in enumerate(zip(grids, picks, strict=True)):
        columns = known.order[number * n_block : (number + 1) * n_block]
        codes = np.empty_like(grid.codes)
        codes[columns - columns.min()] = grid.codes
        put(int(columns.min()), pick, codes)


def _picked(arrays: list[npt.NDArray[T]], pick: npt.NDArray[np.intp]) -> npt.NDArray[T]:
    """Return for each row r column r of arrays[pick[r]], arrays (n_block, n_out)."""
    if len(arrays) == 1:
        return arrays[0]
    found: npt.NDArray[T] = np.take_along_axis(np.stack(arrays), pick[None, None, :], axis=0)[0]
    return found


def _round_block(
    w: Floats, targets: Floats, inside: Floats, remaining: Floats, levels: Floats, grid: Grid
) -> tuple[Codes, Floats, Floats]:
    """Round one block; return codes, errors (n_block, n_out) and what each row costs."""
    targets, errors, codes = targets.copy(), np.empty_like(w), np.empty_like(grid.codes)
    cost = np.zeros_like(w[0])
    for begin in range(0, len(w), _TOGETHER):
        end = min(begin + _TOGETHER, len(w))
        for j in range(begin, end):
            codes[j], value = grid.nearest(j, targets[j], levels)
            errors[j] = w[j] - value
            cost += remaining[j] * np.square(targets[j] - value)
            targets[j + 1 : end] += inside[j, j + 1 : end, None] * errors[j]
        targets[end:] += inside[begin:end, end:].T @ errors[begin:end]
    return codes, errors, cost


def _sweep(
    w: Floats, errors: Floats, products: Floats, begin: int, levels: Floats, grid: Grid
) -> None:
    """Let each column of a block take its best code beside all others; changes errors and codes."""
    n_block = len(grid.codes)
    for start in range(0, n_block, _TOGETHER):
        end = min(start + _TOGETHER, n_block)
        here = slice(begin + start, begin + end)
        slopes = products[here] @ errors
        inside = products[here, here]
        for j in range(end - start):
            column = begin + start + j
            value = w[column] - errors[column]
            wanted = value + slopes[j] / inside[j, j]
            grid.codes[start + j], best = grid.nearest(start + j, wanted, levels)
            moved = best - value
            errors[column] -= moved
            slopes[j + 1 :] -= inside[j, j + 1 :, None] * moved
